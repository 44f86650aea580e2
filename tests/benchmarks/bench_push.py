"""What a version costs on its way: the learner's thread, servers on this host, a late joiner; beside PUB over TCP.

Every server is a process of its own, and so is the snapshot server. Times are over that of one copy of the model
(warm memory, one core) taken in the same round. Run as `python -m tests.benchmarks.bench_push`.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import zmq

from common.snapshot import CHUNK_BYTES
from learner.publisher import Publisher, lay_out, open_publisher
from tests.benchmarks.push_receiver import RUN_ID
from tests.weights.fleet import Weights

DENSITY = 0.01


class Servers:
    """Processes that wait for versions."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self.processes = processes

    async def ready(self) -> None:
        for process in self.processes:
            await self._line(process)

    async def load(self, version: int) -> None:
        """Tell all; returns when all have it."""
        self.tell(version)
        await self.ready()

    def tell(self, version: int) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{version}\n".encode())

    async def _line(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async with asyncio.timeout(300):
            if not await process.stdout.readline():
                raise RuntimeError("a receiving process ended")


@asynccontextmanager
async def servers(count: int, *arguments: str) -> AsyncIterator[Servers]:
    command = (sys.executable, "-m", "tests.benchmarks.push_receiver", *arguments)
    pipe = asyncio.subprocess.PIPE
    started = [await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe) for _ in range(count)]
    try:
        yield Servers(started)
    finally:
        for process in started:
            process.kill()
        await asyncio.gather(*(process.wait() for process in started))


class Learner:
    """Publishes versions; knows how long a copy takes."""

    def __init__(self, publisher: Publisher, weights: Weights) -> None:
        self.publisher = publisher
        self.weights = weights
        self.version = -1
        self.ready = publisher.ready_versions()
        self._copy = np.zeros(publisher.num_bytes, np.uint8)
        self._source = np.ones_like(self._copy)

    def copy_s(self) -> float:
        start_s = time.perf_counter()
        np.copyto(self._copy, self._source)
        return time.perf_counter() - start_s

    async def publish(self, density: float | None) -> tuple[float, float, int]:
        """(seconds of the training thread, seconds of encoding elsewhere, bytes that a server will pull)."""
        if density is None:
            self.weights.replace()
        else:
            self.weights.change(density)
        while (slot := self.publisher.take_slot()) is None:
            await anext(self.ready)
        start_s = time.perf_counter()
        self.publisher.write(slot, self.weights.tensors)
        written_s = time.perf_counter() - start_s
        self.version += 1
        await self.publisher.hand_over(slot, self.version)
        ready = await anext(self.ready)
        return written_s, ready.encode_s, ready.delta_bytes or ready.full_bytes


@asynccontextmanager
async def a_learner(megabytes: int) -> AsyncIterator[Learner]:
    weights = Weights(shapes={f"layer{i}.weight": (1 << 19,) for i in range(megabytes)})
    with tempfile.TemporaryDirectory() as private:
        opened = open_publisher(
            lay_out(weights.tensors),
            run_id=RUN_ID,
            listen="tcp://127.0.0.1:0",
            keys=None,
            private_directory=Path(private),
        )
        async with opened as publisher:
            learner = Learner(publisher, weights)
            waiting = asyncio.ensure_future(anext(learner.ready))
            await publisher.listening()
            slot = publisher.take_slot()
            assert slot is not None
            publisher.write(slot, weights.tensors)
            learner.version = 0
            await publisher.hand_over(slot, 0)
            await waiting
            yield learner


async def measure_pushes(learner: Learner, count: int, rounds: int) -> None:
    async with servers(count, "pull", learner.publisher.address) as group:
        await group.ready()
        copy_s = learner.copy_s()
        start_s = time.perf_counter()
        await group.load(learner.version)
        print(f"  {count} join at once, cold memory: {(time.perf_counter() - start_s) / copy_s:.1f} copies "
              f"({time.perf_counter() - start_s:.2f} s)")  # fmt: skip
        for name, density in (("full", None), (f"delta at {DENSITY:.0%}", DENSITY), ("empty delta", 0.0)):
            rows = []
            for _ in range(rounds):
                written_s, encode_s, pulled = await learner.publish(density)
                copy_s = learner.copy_s()
                start_s = time.perf_counter()
                await group.load(learner.version)
                push_s = time.perf_counter() - start_s
                rows.append((written_s / copy_s, encode_s / copy_s, push_s / copy_s, push_s * 1e3, pulled))
            written, encode, push, push_ms, pulled = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"  {count:3} servers, {name:12} {pulled / 1e6:8.3f} MB each | copies: write {written:5.2f}, "
                  f"encode {encode:6.2f}, push {push:7.2f} ({push_ms:7.1f} ms)", flush=True)  # fmt: skip


async def measure_pub(learner: Learner, count: int, rounds: int) -> None:
    """The control: the same bytes as 1 MB frames of a PUB socket, without digests, into warm memory."""
    data = memoryview(np.ones(learner.publisher.num_bytes, np.uint8))
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:0")
        address = socket.get(zmq.LAST_ENDPOINT).decode()
        async with servers(count, "subscribe", address, str(len(data))) as group:
            waiting = asyncio.ensure_future(group.ready())
            while not waiting.done():
                socket.send(b"?")
                await asyncio.sleep(0.05)
            rows = []
            for _ in range(rounds):
                copy_s = learner.copy_s()
                start_s = time.perf_counter()
                group.tell(1)
                for start in range(0, len(data), CHUNK_BYTES):
                    socket.send(data[start : start + CHUNK_BYTES], copy=False)
                await group.ready()
                push_s = time.perf_counter() - start_s
                rows.append((push_s / copy_s, push_s * 1e3))
            push, push_ms = (statistics.median(column) for column in zip(*rows, strict=True))
            print(f"  {count:3} servers, PUB over TCP {len(data) / 1e6:8.3f} MB each | push {push:7.2f} copies "
                  f"({push_ms:7.1f} ms)", flush=True)  # fmt: skip


async def measure(megabytes: int, counts: list[int], rounds: int) -> None:
    async with a_learner(megabytes) as learner:
        copy_ms = statistics.median(learner.copy_s() for _ in range(9)) * 1e3
        print(f"model of {learner.publisher.num_bytes / 1e6:.0f} MB in bfloat16; one copy {copy_ms:.1f} ms")
        for count in counts:
            await measure_pushes(learner, count, rounds)
            await measure_pub(learner, count, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64, help="of the model (default: 64)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 4, 8], help="(default: 1 4 8)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(measure(options.megabytes, options.servers, options.rounds))


if __name__ == "__main__":
    main()
