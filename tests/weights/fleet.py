"""A publisher with its real snapshot server, receivers behind proxies, and engines that doubt what they load."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.canary import Canary
from common.delta.formats import FORMATS
from common.events import EventLog
from common.messages import RelayPlace, RelayPlan
from common.snapshot import ITEM_BYTES, NO_VERSION, digest_of
from common.wire import open_dealer
from learner.base_model import BaseModel
from learner.publisher import Publisher, open_publisher
from learner.slots import lay_out
from learner.snapshot_messages import SnapshotReady
from rollout_server.chunk_sources import Upstream
from rollout_server.inference import InferenceEngine, LocalSnapshot, WeightUpdate
from rollout_server.nearest_snapshots import TRANSPORTS, TransportName
from rollout_server.relay import Relaying, open_relay
from rollout_server.table_engine import TableEngine
from rollout_server.weight_receiver import WeightReceiver
from tests.fault_proxy import FaultProxy
from tests.listening import stop_listening

RUN_ID = "run.1"
CHUNK_BYTES = 1 << 15
RELAYED = "relayed"
"""A transport: over ZeroMQ, from the member that joined before, if there is one."""
SHAPES = {"embedding": (800, 512), "layer.weight": (512, 300), "norm": (512,)}


class Weights:
    """bfloat16 tensors that change as training would have them; remembers the digest of every version."""

    def __init__(self, seed: int = 0, shapes: dict[str, tuple[int, ...]] | None = None) -> None:
        self._rng = np.random.default_rng(seed)
        self.tensors = [
            (name, torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(0.02).bfloat16())
            for name, shape in (shapes or SHAPES).items()
        ]
        self.digests: dict[int, bytes] = {}

    def change(self, share: float) -> None:
        """Each element with this probability by one unit in the last place."""
        for _, tensor in self.tensors:
            words = tensor.view(torch.int16).numpy()
            words += self._rng.random(words.shape) < share

    def replace(self) -> None:
        """So much changes that a delta does not pay."""
        for _, tensor in self.tensors:
            tensor.copy_(torch.from_numpy(self._rng.normal(0, 0.02, tuple(tensor.shape))))

    def canary(self) -> Canary | None:
        """Nothing computes with these weights."""
        return None

    def remember(self, version: int) -> None:
        self.digests[version] = digest_of(b"".join(t.view(torch.int16).numpy().tobytes() for _, t in self.tensors))


class DoubtingEngine(TableEngine):
    """Loads by changes when it may; counts the loads whose result is not exactly one published version."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(vocab_size=2, max_model_len=8, eos_id=0)
        self._weights = weights
        self._bytes = np.empty(0, np.uint8)
        self.loads_by_changes = 0
        self.mixed: list[int] = []

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        data = np.fromfile(snapshot.path, np.uint8)
        if snapshot.changes is not None and snapshot.changes.base_version == self.loaded_version:
            self._apply_changes(snapshot)
            self.loads_by_changes += 1
        else:
            self._bytes = data
        self.loaded_version = snapshot.manifest.version
        for loaded in (self._bytes, data):
            if digest_of(loaded.data) != self._weights.digests[self.loaded_version]:
                self.mixed.append(self.loaded_version)
        return WeightUpdate(version=self.loaded_version, pause_s=0.0)

    def _apply_changes(self, snapshot: LocalSnapshot) -> None:
        assert snapshot.changes is not None
        specs = {spec.name: spec for spec in snapshot.manifest.tensors}
        for name, changed, values in snapshot.changes.read(snapshot.manifest):
            spec, words = specs[name], FORMATS[specs[name].dtype].words
            place = slice(spec.offset, spec.offset + spec.num_bytes)
            assert np.all(np.diff(changed) > 0)
            assert changed.size
            assert changed[-1] < spec.num_bytes // ITEM_BYTES[spec.dtype]
            self._bytes[place].view(words)[changed] = values


class CuttingProxy(FaultProxy):
    """Cuts once, after so many more bytes to those who connect."""

    cut_after: int | None = None

    async def _write(
        self, direction: str, data: bytes, writer: asyncio.StreamWriter, bytes_per_s: float | None
    ) -> None:
        if direction == "down" and self.cut_after is not None:
            kept = data[: self.cut_after]
            self.cut_after -= len(kept)
            if self.cut_after == 0:
                self.cut_after = None
                await super()._write(direction, kept, writer, bytes_per_s)
                writer.close()  # exactly these bytes arrive; a reset might take some of them back
                self.cut()
                return
        await super()._write(direction, data, writer, bytes_per_s)


@asynccontextmanager
async def a_cutting_proxy(target: str) -> AsyncIterator[CuttingProxy]:
    host, _, port = target.removeprefix("tcp://").rpartition(":")
    proxy = CuttingProxy((host, int(port)), 0)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        await stop_listening(server)
        await proxy.close()
        await server.wait_closed()


class Member:
    """One receiver with its engine, the proxy between it and the learner, and one between its relay and others."""

    def __init__(self, proxy: CuttingProxy, receiver: WeightReceiver, engine: Any) -> None:
        self.proxy = proxy
        self.receiver = receiver
        self.engine = engine
        self.relay_proxy: CuttingProxy | None = None

    @property
    def upstream(self) -> Upstream:
        return self.receiver.relaying.upstream

    @property
    def bytes_of_learner(self) -> int:
        """Of chunks."""
        return self.receiver.received_bytes - self.upstream.pulled_bytes


def follow(member: Member, source: Member | None, *, level: int = 1) -> None:
    """As if the coordinator had said where the member pulls; None: from the learner."""
    place = None
    if source is not None:
        assert source.relay_proxy is not None
        place = RelayPlace(server="the one before", address=source.relay_proxy.address, key=b"", level=level)
    member.receiver.relaying.follow(RelayPlan(source=place, admitted=()))


class Fleet:
    """Publishes, and has receivers join and follow."""

    def __init__(self, weights: Weights, publisher: Publisher, tasks: asyncio.TaskGroup, directory: Path) -> None:
        self.weights = weights
        self.publisher = publisher
        self.members: list[Member] = []
        self.ready: asyncio.Queue[SnapshotReady] = asyncio.Queue()
        self.version = NO_VERSION
        self._tasks = tasks
        self._directory = directory
        self.run_id = RUN_ID
        self._running = [tasks.create_task(self._follow())]
        self._stack = AsyncExitStack()

    async def _follow(self) -> None:
        async for ready in self.publisher.ready_versions():
            self.ready.put_nowait(ready)

    async def publish(self, share: float | None) -> SnapshotReady:
        """Change that share of the elements (None: all, and much); returns once that is served. Nobody is told yet."""
        if share is None:
            self.weights.replace()
        else:
            self.weights.change(share)
        self.version += 1
        self.weights.remember(self.version)
        while (slot := self.publisher.take_slot()) is None:
            await self.publisher.slot_free()
        self.publisher.write(slot, self.weights.tensors)
        await self.publisher.hand_over(slot, self.version, self.weights.canary())
        ready = await self.ready.get()
        assert ready.version == self.version
        return ready

    async def join(
        self,
        transport: TransportName | Literal["relayed"] = "zeromq",
        engine: InferenceEngine | None = None,
        *,
        is_direct: bool = False,
    ) -> Member:
        """is_direct: the member's proxy is not between it and the publisher, for the proxy costs more than they do."""
        proxy = await self._stack.enter_async_context(a_cutting_proxy(self.publisher.address))
        address = self.publisher.address if is_direct else proxy.address
        dealer = await self._stack.enter_async_context(open_dealer(address))
        events = self._stack.enter_context(
            closing(EventLog(self._directory / f"{len(self.members)}.jsonl", "rollout_server"))
        )
        engine, relaying = engine or DoubtingEngine(self.weights), Relaying()
        if transport == RELAYED:
            await self._stack.enter_async_context(open_relay(relaying, "tcp://127.0.0.1:0"))
        way = TRANSPORTS["zeromq" if transport == RELAYED else transport]
        receiver = self._stack.enter_context(closing(WeightReceiver(engine, events, transport=way, relaying=relaying)))
        await receiver.follow(self.run_id)
        member = Member(proxy, receiver, engine)
        if transport == RELAYED:
            member.relay_proxy = await self._stack.enter_async_context(a_cutting_proxy(relaying.address))
            follow(member, self.members[-1] if self.members else None)
        self._running.append(self._tasks.create_task(receiver.run(dealer)))
        self.members.append(member)
        return member

    async def deliver(self) -> None:
        """Tell all members of the newest version, and wait until they have it."""
        for member in self.members:
            await member.receiver.announce(self.version)
        for member in self.members:
            await member.receiver.wait_for_version(self.version)

    def stop_following(self) -> None:
        """Its members."""
        for task in self._running[1:]:
            task.cancel()

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._stack.aclose()


@asynccontextmanager
async def a_fleet(
    directory: Path,
    *,
    num_members: int,
    patience_s: float,
    weights: Weights | None = None,
    transport: TransportName | Literal["relayed"] = "zeromq",
    run_id: str = RUN_ID,
    chunk_bytes: int = CHUNK_BYTES,
    base_model: BaseModel | None = None,
) -> AsyncIterator[Fleet]:
    """base_model: what the weights are adapters of."""
    weights = weights or Weights()
    with tempfile.TemporaryDirectory() as private:  # a socket's path must be short
        async with (
            asyncio.timeout(patience_s),
            open_publisher(
                lay_out(weights.tensors),
                run_id=run_id,
                listen="tcp://127.0.0.1:0",
                keys=None,
                private_directory=Path(private),
                chunk_bytes=chunk_bytes,
                base_model=base_model,
            ) as publisher,
            asyncio.TaskGroup() as tasks,
        ):
            fleet = Fleet(weights, publisher, tasks, directory)
            try:
                await publisher.listening()
                fleet.run_id = run_id
                for _ in range(num_members):
                    await fleet.join(transport)
                yield fleet
            finally:
                await fleet.close()
