"""Servers as real processes that give weights on to each other, with keys, one of which is killed."""

import asyncio
import re
import signal

import pytest

from deploy.up import a_free_port
from tests.storm.fleet import Fleet

STEPS = 1000  # servers may have joined the learner late, on a busy machine: they start before there is a key
FLAGS = (
    "--relay-weights", 2, "--groups-per-step", 4, "--group-size", 2, "--max-staleness", 1, "--total-steps", STEPS,
    "--server-timeout-s", 3, "--seed", 0,
)  # fmt: skip


@pytest.mark.timeout(300)
async def test_a_run_whose_servers_give_weights_on_to_each_other_ends_also_when_one_of_them_is_killed(tmp_path):
    port = a_free_port()
    from_elsewhere = ("--learner", f"tcp://127.0.0.1:{port}", "--key", str(tmp_path / "run/keys/rollout-server.key"))
    fleet = Fleet(
        tmp_path,
        (*FLAGS, "--listen", f"tcp://0.0.0.0:{port}"),
        servers=5,
        server_flags=("--weights-from", "zeromq", "--relay-listen", "tcp://0.0.0.0:0", *from_elsewhere),
    )

    def said(pattern: str) -> list[str]:
        logs = (path.read_text() for path in tmp_path.glob("server-*.log"))
        return [match for log in logs for match in re.findall(pattern, log)]

    async with asyncio.timeout(250), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(fleet.run())
        while not (relays := said(r"weights come from the relay of (server-\d+)")):
            await asyncio.sleep(0.05)
        reached = fleet.last_step()
        while fleet.last_step() < reached + 20:
            await asyncio.sleep(0.05)
        [relay] = [
            pid for pid, role in fleet.processes().items()
            if role == "rollout server" and f"--name\0{relays[0]}\0" in (words_of(pid))
        ]  # fmt: skip
        fleet.signal(relay, signal.SIGKILL)
        await running
    given = [float(kilobytes) for kilobytes in said(r"gave ([0-9.]+) kB of weights to other rollout servers")]
    assert sum(given) > 0
    assert not said("Traceback")
    assert not said("is not on the allow-list")
    assert fleet.last_step() == STEPS


def words_of(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()
