"""A snapshot server that can be told to fail in every way, and a receiver that follows it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path

import numpy as np

from common.canary import Canary
from common.codec import Decoder, encode
from common.delta import DeltaManifest, blocks_of, build_delta_manifest, encode_delta, encode_delta_manifest
from common.events import EventLog
from common.messages import Message
from common.snapshot import NO_VERSION, SnapshotManifest, TensorSpec, build_manifest, encode_manifest
from common.weight_messages import (
    ChunkReply,
    ChunkRequest,
    DeltaReply,
    ManifestReply,
    ManifestRequest,
    NoNewer,
    ServerToSnapshots,
    SnapshotGone,
)
from common.wire import Router, open_dealer, open_router
from rollout_server.table_engine import TABLE_TENSOR, TableEngine
from rollout_server.weight_receiver import WeightReceiver

PATIENCE_S = 20.0
V = 16
CHUNK_BYTES = 64
NUM_CHUNKS = V * V * 4 // CHUNK_BYTES  # more than are in flight at once
RUN_ID = "run.1"
SPECS = (TensorSpec(TABLE_TENSOR, (V, V), "float32", 0),)

Answer = tuple[Message, bytes]
Fault = Callable[[Message, Answer], Answer | None]  # what is answered instead; None: nothing


def honestly(request: Message, answer: Answer) -> Answer:
    return answer


def a_table(version: int) -> np.ndarray:
    table = np.random.default_rng(0).normal(size=(V, V)).astype("<f4")
    table[:, 0] += version  # so little that a delta pays
    return table


OnDoubt = Callable[[str], Awaitable[None]]


async def nobody(doubt: str) -> None:
    pass


CanaryOf = Callable[[int], Canary | None]  # version -> its canary


def without_canary(version: int) -> None:
    return None


def a_manifest(version: int, run_id: str = RUN_ID, canary_of: CanaryOf = without_canary) -> SnapshotManifest:
    data, canary = memoryview(a_table(version).tobytes()), canary_of(version)
    return build_manifest(data, SPECS, run_id=run_id, version=version, chunk_bytes=CHUNK_BYTES, canary=canary)


def a_delta(base: int, target: int, canary_of: CanaryOf = without_canary) -> tuple[DeltaManifest, bytes]:
    old, new = a_table(base).tobytes(), a_table(target).tobytes()
    blocks = encode_delta(old, new, blocks_of(SPECS))
    assert blocks is not None
    manifests = (a_manifest(version, canary_of=canary_of) for version in (base, target))
    return build_delta_manifest(*manifests, blocks, chunk_bytes=CHUNK_BYTES)


class SnapshotServer:
    """Serves version `newest`, unless its fault says otherwise; remembers what it was asked.

    Deltas, where it has them, lead from the version that is held to the newest.
    """

    def __init__(
        self,
        newest: int = 0,
        run_id: str = RUN_ID,
        address: str = "tcp://127.0.0.1:0",
        *,
        has_deltas: bool = False,
        canary_of: CanaryOf = without_canary,
    ) -> None:
        self.newest = newest
        self.has_deltas = has_deltas
        self._canary_of = canary_of
        self.run_id = run_id
        self.address = address
        self.fault: Fault = honestly
        self.requests: list[Message] = []
        self._decoder = Decoder(ServerToSnapshots, max_payload_bytes=0)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """At the same address whenever it is opened again."""
        async with open_router(self.address, max_frame_bytes=1 << 20) as router, asyncio.TaskGroup() as tasks:
            self.address = router.address
            serving = tasks.create_task(self._serve(router))
            yield
            serving.cancel()

    async def _serve(self, router: Router) -> None:
        while True:
            for incoming in await router.receive():
                request, _ = self._decoder.decode(incoming.frames)
                self.requests.append(request)
                answer = self.fault(request, self._answer(request))
                if answer is not None:
                    router.send(incoming.peer, encode(*answer))

    def _answer(self, request: Message) -> Answer:
        match request:
            case ManifestRequest(newer_than=version) if version >= self.newest:
                return NoNewer(version=self.newest), b""
            case ManifestRequest(held_version=held) if self.has_deltas and held != NO_VERSION:
                manifest, _ = a_delta(held, self.newest, self._canary_of)
                return DeltaReply(version=self.newest, base_version=held), encode_delta_manifest(manifest)
            case ManifestRequest():
                manifest = a_manifest(self.newest, self.run_id, self._canary_of)
                return ManifestReply(version=self.newest), encode_manifest(manifest)
            case ChunkRequest(version=self.newest, index=index, base_version=base) if base != NO_VERSION:
                manifest, data = a_delta(base, self.newest, self._canary_of)
                start, end = manifest.chunk_range(index)
                return ChunkReply(version=self.newest, index=index, base_version=base), data[start:end]
            case ChunkRequest(version=self.newest, index=index):
                start = index * CHUNK_BYTES
                chunk = a_table(self.newest).tobytes()[start : start + CHUNK_BYTES]
                return ChunkReply(version=self.newest, index=index), chunk
            case _:
                return SnapshotGone(version=request.version, newest=self.newest), b""

    def asked(self, kind: type[Message]) -> list[Message]:
        return [request for request in self.requests if isinstance(request, kind)]

    def chunks_asked(self, version: int) -> list[int]:
        return [request.index for request in self.asked(ChunkRequest) if request.version == version]


@asynccontextmanager
async def following(
    server: SnapshotServer, tmp_path: Path, engine: TableEngine | None = None, on_doubt: OnDoubt = nobody
):
    """A receiver that follows the run, not told of any version yet."""
    engine = engine or TableEngine(vocab_size=V, max_model_len=64, eos_id=0)
    async with asyncio.timeout(PATIENCE_S), open_dealer(server.address) as dealer, asyncio.TaskGroup() as tasks:
        with a_receiver(engine, tmp_path) as receiver:
            await receiver.follow(RUN_ID)
            running = tasks.create_task(receiver.run(dealer, on_doubt=on_doubt))
            yield receiver, engine
            running.cancel()


@contextmanager
def a_receiver(engine: TableEngine, tmp_path: Path) -> Iterator[WeightReceiver]:
    with (
        closing(EventLog(tmp_path / "events.jsonl", "rollout_server")) as events,
        closing(WeightReceiver(engine, events)) as receiver,
    ):
        yield receiver


async def assert_loaded(engine: TableEngine, version: int) -> None:
    """Its log-probabilities are those of that version's table."""
    assert engine.loaded_version == version
    ids = np.arange(V, dtype=np.int32)
    table = a_table(version).astype(np.float64)
    logprobs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(await engine.token_logprobs(ids), logprobs[ids[:-1], ids[1:]], atol=1e-6)
