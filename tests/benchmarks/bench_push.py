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
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import zmq

from common.keys import ServerKeys
from common.snapshot import CHUNK_BYTES
from learner.publisher import Publisher, open_publisher
from learner.slots import lay_out
from tests.benchmarks.push_receiver import RUN_ID
from tests.weights.fleet import Weights

DENSITY = 0.01
TRANSPORTS = ("zeromq", "shared_memory")
GATED_SERVERS, GATE, GOAL = 8, 0.6, 0.35  # time of a push to so many servers on this host, over PUB's


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
async def servers(
    count: int, *arguments: str, module: str = "tests.benchmarks.push_receiver"
) -> AsyncIterator[Servers]:
    command = (sys.executable, "-m", module, *arguments)
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

    def serving_s(self) -> float:
        """Processor time of the snapshot server's process, all its threads."""
        tasks = Path(f"/proc/{self.publisher._server._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

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
async def a_learner(megabytes: int, keys: ServerKeys | None = None) -> AsyncIterator[Learner]:
    weights = Weights(shapes={f"layer{i}.weight": (1 << 19,) for i in range(megabytes)})
    with tempfile.TemporaryDirectory() as private:
        opened = open_publisher(
            lay_out(weights.tensors),
            run_id=RUN_ID,
            listen="tcp://127.0.0.1:0",
            keys=keys,
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


class Pub:
    """The control: the same bytes as 1 MB frames of a PUB socket, without digests, into warm memory."""

    def __init__(self, socket: zmq.Socket[bytes], data: memoryview, group: Servers) -> None:
        self._socket = socket
        self._data = data
        self._group = group

    async def push(self) -> None:
        self._group.tell(1)
        for start in range(0, len(self._data), CHUNK_BYTES):
            self._socket.send(self._data[start : start + CHUNK_BYTES], copy=False)
        await self._group.ready()


@asynccontextmanager
async def a_pub(num_bytes: int, count: int) -> AsyncIterator[Pub]:
    data = memoryview(np.ones(num_bytes, np.uint8))
    with zmq.Context() as context, context.socket(zmq.PUB) as socket:
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.LINGER, 0)
        socket.bind("tcp://127.0.0.1:0")
        address = socket.get(zmq.LAST_ENDPOINT).decode()
        async with servers(count, "subscribe", address, str(num_bytes)) as group:
            waiting = asyncio.ensure_future(group.ready())
            while not waiting.done():
                socket.send(b"?")
                await asyncio.sleep(0.05)
            yield Pub(socket, data, group)


async def timed_s(work: Awaitable[None]) -> float:
    start_s = time.perf_counter()
    await work
    return time.perf_counter() - start_s


async def measure_pushes(learner: Learner, count: int, rounds: int) -> None:
    """All ways in every round, one after the other, each over a copy that is taken in that round."""
    async with AsyncExitStack() as stack:
        groups = {}
        for transport in TRANSPORTS:
            arguments = ("receive", learner.publisher.address, transport)
            groups[transport] = await stack.enter_async_context(servers(count, *arguments))
            await groups[transport].ready()
            join_s = await timed_s(groups[transport].load(learner.version))
            print(f"  {count} join at once over {transport}, cold memory: {join_s / learner.copy_s():.1f} copies "
                  f"({join_s:.2f} s)", flush=True)  # fmt: skip
        pub = await stack.enter_async_context(a_pub(learner.publisher.num_bytes, count))
        for name, density in (("full", None), (f"delta at {DENSITY:.0%}", DENSITY), ("empty delta", 0.0)):
            rows = []
            for _ in range(rounds):
                written_s, encode_s, pulled = await learner.publish(density)
                copy_s = learner.copy_s()
                busy_s = learner.serving_s()
                pushes_s = [await timed_s(groups["zeromq"].load(learner.version))]
                busy_s = learner.serving_s() - busy_s
                pushes_s.append(await timed_s(groups["shared_memory"].load(learner.version)))
                pub_s = await timed_s(pub.push())
                copies = (each_s / copy_s for each_s in (written_s, encode_s, *pushes_s, pub_s))
                rows.append([pulled, *copies, copy_s * 1e3, busy_s * 1e3])
            report(count, name, [statistics.median(column) for column in zip(*rows, strict=True)])


def report(count: int, name: str, medians: list[float]) -> None:
    pulled, written, encode, zeromq, shared, pub, copy_ms, busy_ms = medians
    print(f"  {count:3} servers, {name:12} {pulled / 1e6:7.3f} MB | copies of {copy_ms:.1f} ms: write {written:5.2f}, "
          f"encode {encode:5.2f}, ZeroMQ {zeromq:6.2f}, shared memory {shared:6.2f}, PUB of all {pub:6.2f} | "
          f"of PUB: {zeromq / pub:.2f}, {shared / pub:.2f}{gate(count, shared / pub)} | "
          f"the publisher's processor over ZeroMQ {busy_ms:6.1f} ms", flush=True)  # fmt: skip


def gate(count: int, share: float) -> str:
    if count != GATED_SERVERS:
        return ""
    verdict = "goal met" if share <= GOAL else "gate met" if share <= GATE else "GATE MISSED"
    return f" (gate {GATE}, goal {GOAL}): {verdict}"


async def measure(megabytes: int, counts: list[int], rounds: int) -> None:
    async with a_learner(megabytes) as learner:
        copy_ms = statistics.median(learner.copy_s() for _ in range(9)) * 1e3
        print(f"model of {learner.publisher.num_bytes / 1e6:.0f} MB in bfloat16; one copy {copy_ms:.1f} ms")
        for count in counts:
            await measure_pushes(learner, count, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=64, help="of the model (default: 64)")
    parser.add_argument("--servers", type=int, nargs="+", default=[1, 4, 8], help="(default: 1 4 8)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    asyncio.run(measure(options.megabytes, options.servers, options.rounds))


if __name__ == "__main__":
    main()
