"""With any role missing, each other one names what it waits for within 10 s, keeps saying it, and goes on by itself."""

import asyncio
import random
import re
import signal
import time
from contextlib import asynccontextmanager

import pytest

from tests.storm.fleet import Fleet
from tests.storm.sigterm import terminate_at_random

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMED_S = 10.0
BUSY_S = 5.0  # that a machine which does other things besides may take to let anybody say it
START_S = 120.0
LOOK_EVERY_S = 0.1
FLAGS = (
    "--groups-per-step", 4, "--group-size", 2, "--max-staleness", 0, "--total-steps", 100_000,
    "--checkpoint-every-steps", 1000, "--server-timeout-s", 3, "--seed", 0,
)  # fmt: skip
NOBODY = r"waiting since \d+ s: no rollout server has joined at tcp://"
NO_COORDINATOR = r"waiting since \d+ s: the coordinator, process \d+: nothing heard of it for"
NO_LEARNER = r"waiting for the learner at tcp://\S+: is it running"
SILENT_LEARNER = r"waiting for the learner at tcp://\S+: nothing heard of it"
STOPPED_LEARNER = r"waiting for the learner to complete step"
STOPPED_SERVER = r"waiting since \d+ s: (server server-0: .*nothing heard of it|no rollout server has joined)"
NO_SNAPSHOTS = r"waiting for snapshot \d+ of the learner"
UNSERVED = r"waiting since \d+ s: server server-0: .*which needs snapshot \d+; the learner's snapshot server"


class Roles:
    """A learner and one rollout server, and what they say."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def said(self, log: str, pattern: str) -> int:
        path = self.fleet.directory / log
        return len(re.findall(pattern, path.read_text())) if path.exists() else 0

    async def until(self, condition, what: str, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
            await asyncio.sleep(LOOK_EVERY_S)

    async def names(self, log: str, pattern: str, *, since: int = 0) -> None:
        """Within 10 s, and again within as long."""
        for times in (1, 2):
            await self.until(
                lambda times=times: self.said(log, pattern) >= since + times,
                f"{log} says {pattern!r} for the {times}. time",
                NAMED_S + BUSY_S,
            )

    async def goes_on(self) -> None:
        goal = self.fleet.last_step() + 3
        await self.until(lambda: self.fleet.last_step() >= goal, f"step {goal}", START_S)

    @asynccontextmanager
    async def without(self, role: str):
        """The role is there, and does nothing."""
        pids = [pid for pid, found in self.fleet.processes().items() if found == role]
        assert pids, f"no {role} in {self.fleet.processes()}"
        for pid in pids:
            self.fleet.signal(pid, signal.SIGSTOP)
        yield
        for pid in pids:
            self.fleet.signal(pid, signal.SIGCONT)
        await self.goes_on()

    async def missing(self, role: str, *said: tuple[str, str]) -> None:
        before = [self.said(*one) for one in said]
        async with self.without(role), asyncio.TaskGroup() as tasks:
            for (log, pattern), since in zip(said, before, strict=True):
                tasks.create_task(self.names(log, pattern, since=since))


async def test_a_server_without_a_learner_and_a_learner_without_servers_name_each_other_and_find_each_other(tmp_path):
    fleet = Fleet(tmp_path, FLAGS, servers=1)
    roles = Roles(fleet)
    try:
        async with asyncio.TaskGroup() as tasks:
            server = tasks.create_task(fleet.keep_server(0))
            await roles.until(lambda: "rollout server" in fleet.processes().values(), "a server", START_S)
            await roles.until(lambda: roles.said("server-0.log", NO_LEARNER) >= 2, NO_LEARNER, START_S)
            server.cancel()
            learner = tasks.create_task(fleet.live_learner())
            await roles.until(lambda: roles.said("learner.log", NOBODY) >= 2, NOBODY, START_S)
            server = tasks.create_task(fleet.keep_server(0))
            await roles.goes_on()
            server.cancel()
            learner.cancel()
    finally:
        fleet.kill_all()


async def test_whoever_is_missing_is_named_by_the_others_until_it_is_back(tmp_path):
    fleet = Fleet(tmp_path, FLAGS, servers=1)
    roles = Roles(fleet)
    running = asyncio.create_task(fleet.run())
    try:
        await roles.until(lambda: fleet.last_step() >= 2, "step 2", START_S)
        await roles.missing("coordinator", ("learner.log", NO_COORDINATOR), ("server-0.log", SILENT_LEARNER))
        await roles.missing("learner", ("server-0.log", STOPPED_LEARNER))
        await roles.missing("snapshot server", ("server-0.log", NO_SNAPSHOTS), ("learner.log", UNSERVED))
        await roles.missing("rollout server", ("learner.log", STOPPED_SERVER))
    finally:
        running.cancel()
        fleet.kill_all()
        await asyncio.wait({running})


async def test_sigterm_at_any_instant_ends_within_five_seconds_and_leaves_nobody_behind(tmp_path):
    assert await terminate_at_random(tmp_path, points=5, rng=random.Random(3)) == []
