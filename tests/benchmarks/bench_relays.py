"""What leaves the learner, and how long a version takes to reach all servers, with and without relaying.

Processes on one host, whose processors they share: what is saved is bytes of the learner, and work of its publisher.
Run as `python -m tests.benchmarks.bench_relays`.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec

from common.keys import ServerKeys, ensure_client_key, ensure_server_keys, load_client_key
from common.wire import curve_keypair
from learner.coordinator.relays import RelayServer, RelayTree
from tests.benchmarks.bench_push import DENSITY, Learner, Servers, a_learner, servers


async def line_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(300):
        return (await process.stdout.readline()).decode().strip()


def named_servers(said: Sequence[str], own_key: bytes) -> list[RelayServer]:
    named = []
    for number, line in enumerate(said):
        address, _, key = line.partition(" ")
        named.append(
            RelayServer(server_id=f"server {number}", address=address, relay_key=bytes.fromhex(key), own_key=own_key)
        )
    return named


async def follow_plans(group: Servers, named: Sequence[RelayServer], fan_out: int) -> None:
    """As the coordinator would have it; 0: all pull from the learner."""
    plans = RelayTree(fan_out or len(named)).plans(named)
    for process, server in zip(group.processes, named, strict=True):
        assert process.stdin is not None
        process.stdin.write(msgspec.msgpack.encode(plans[server.server_id]).hex().encode() + b"\n")
        assert await line_of(process) == "followed"


async def push(learner: Learner, group: Servers, density: float | None) -> list[float]:
    """[seconds until all have it, bytes from the learner, from relays, publisher's processor s, work per s, wait s]."""
    await learner.publish(density)
    busy_s, start_s = learner.serving_s(), time.perf_counter()
    group.tell(learner.version)
    answers = [line.split() for line in await asyncio.gather(*map(line_of, group.processes))]
    took_s, busy_s = time.perf_counter() - start_s, learner.serving_s() - busy_s
    from_learner, from_relays = (sum(int(answer[place]) for answer in answers) for place in (0, 1))
    # Of the first, which gives on to most.
    return [took_s, from_learner, from_relays, busy_s, int(answers[0][2]) / float(answers[0][3]), float(answers[0][4])]


async def measure(
    megabytes: int, count: int, fan_outs: Sequence[int], rounds: int, key_file: Path | None, keys: ServerKeys | None
) -> None:
    async with AsyncExitStack() as stack:
        learner = await stack.enter_async_context(a_learner(megabytes, keys))
        own_key = load_client_key(key_file).public if key_file is not None else b""
        arguments = (learner.publisher.address, *([str(key_file)] if key_file is not None else []))
        opened = servers(count, *arguments, module="tests.benchmarks.relaying_server")
        group = await stack.enter_async_context(opened)
        named = named_servers([await line_of(process) for process in group.processes], own_key)
        await follow_plans(group, named, 0)
        group.tell(learner.version)
        await asyncio.gather(*map(line_of, group.processes))
        print(
            f"model of {learner.publisher.num_bytes / 1e6:.0f} MB in bfloat16, {count} servers on this host, "
            f"{'with' if keys is not None else 'without'} keys"
        )
        for name, density in (("full", None), (f"delta at {DENSITY:.0%}", DENSITY)):
            rows: dict[int, list[list[float]]] = {fan_out: [] for fan_out in fan_outs}
            for _ in range(rounds):
                for fan_out in fan_outs:
                    await follow_plans(group, named, fan_out)
                    rows[fan_out].append(await push(learner, group, density))
            for fan_out in fan_outs:
                report(name, fan_out, rows[fan_out])


def report(name: str, fan_out: int, rows: list[list[float]]) -> None:
    took_s, from_learner, from_relays, busy_s, work, wait_s = map(statistics.median, zip(*rows, strict=True))
    print(f"  {name:12} fan-out {fan_out or '-':>2} | from the learner {from_learner / 1e6:8.2f} MB, from servers "
          f"{from_relays / 1e6:8.2f} MB | all have it after {took_s:.2f} s | the publisher's processor "
          f"{busy_s * 1e3:6.1f} ms | work beside it {work:5.0f} a second, waits {wait_s * 1e3:4.0f} ms at most",
          flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=32, help="of the model (default: 32)")
    parser.add_argument("--servers", type=int, default=16, help="(default: 16)")
    parser.add_argument("--fan-outs", type=int, nargs="+", default=[0, 2, 4], help="0: no relays (default: 0 2 4)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keys", action="store_true", help="encrypt, as beyond loopback")
    options = parser.parse_args()
    given = (options.megabytes, options.servers, options.fan_outs, options.rounds)
    if not options.keys:
        asyncio.run(measure(*given, None, None))
        return
    with tempfile.TemporaryDirectory() as directory:
        keys = ensure_server_keys(Path(directory), curve_keypair)
        asyncio.run(measure(*given, ensure_client_key(keys, "servers", curve_keypair), keys))


if __name__ == "__main__":
    main()
