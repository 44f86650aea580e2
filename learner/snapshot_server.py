"""The process that encodes published snapshots and serves their chunks to rollout servers, beside the next step.

`python -m learner.snapshot_server SETTINGS.json`, started by the learner. The learner writes each snapshot into a
slot of shared memory (an anonymous file that both processes map) and says so; everything else happens here.

Each version is encoded against the one published before, whose slot is still there: it is the newest until its
successor is ready. A version that is written while another is being encoded waits, unless a newer one comes: nothing
queues up.
"""

import asyncio
import logging
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from common.codec import Decoder, Frame, Frames, encode
from common.delta import encode_delta_manifest
from common.keys import load_server_keys
from common.lifecycle import configure_logging, die_with_parent, leave, run_until_stopped
from common.shared_slots import host_id
from common.snapshot import CHUNK_BYTES, NO_VERSION, TensorSpec, encode_manifest
from common.snapshot_answers import MAX_REQUEST_BYTES, answer_requests
from common.weight_messages import (
    ChunkRequest,
    DeltaReply,
    ManifestReply,
    ManifestRequest,
    MappingReply,
    MappingRequest,
    OtherHost,
)
from common.wire import Dealer, Router, open_dealer, open_router
from learner.delta_shelf import Delta, DeltaShelf
from learner.served_base_model import BaseModelPlace, ServedBaseModel
from learner.slot_maps import SlotMaps
from learner.snapshot_building import SnapshotBuilder
from learner.snapshot_messages import (
    LearnerToSnapshots,
    SlotReleased,
    SnapshotReady,
    SnapshotsListening,
    SnapshotWritten,
)
from learner.snapshot_shelf import SnapshotShelf

logger = logging.getLogger(__name__)

RELEASE_INTERVAL_S = 0.25
MAX_LAYOUT_BYTES = 16 << 20

layout_decoder = msgspec.msgpack.Decoder(tuple[TensorSpec, ...])


class SnapshotServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the learner tells its snapshot server at the start."""

    run_id: str
    parent_pid: int
    listen: str
    keys_directory: str | None
    learner_socket: str
    slot_descriptors: list[int]
    slot_bytes: int
    chunk_bytes: int = CHUNK_BYTES
    base_model: BaseModelPlace | None = None  # None: versions are the whole policy


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenSnapshot:
    """What the learner wrote and nobody looked at yet."""

    order: SnapshotWritten
    layout: tuple[TensorSpec, ...]


class SnapshotService:
    """SnapshotShelf and DeltaShelf for many servers at once: adds sockets, threads that encode, and the clock."""

    def __init__(
        self,
        builder: SnapshotBuilder,
        servers: Router,
        learner: Dealer,
        slots: SlotMaps,
        base_model: ServedBaseModel | None = None,
    ) -> None:
        self._builder = builder
        self._base_model = base_model
        self._servers = servers
        self._learner = learner
        self._slots = slots
        self._shelf = SnapshotShelf()
        self._deltas = DeltaShelf()
        self._written: WrittenSnapshot | None = None
        self._is_written = asyncio.Event()
        self._overtaken_versions = 0
        self._orders = Decoder(LearnerToSnapshots, max_payload_bytes=MAX_LAYOUT_BYTES)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(answer_requests(self._servers, self))
            tasks.create_task(self._take_orders())
            tasks.create_task(self._publish())
            tasks.create_task(self._release_slots())

    async def _take_orders(self) -> None:
        while True:
            order, layout = self._orders.decode(await self._learner.receive())
            assert isinstance(order, SnapshotWritten)
            overtaken = self._written
            self._written = WrittenSnapshot(order=order, layout=layout_decoder.decode(layout))
            self._is_written.set()
            if overtaken is not None:
                self._overtaken_versions += 1
                await self._learner.send(encode(SlotReleased(slot=overtaken.order.slot)))

    async def _publish(self) -> None:
        while True:
            await self._is_written.wait()
            written, self._written = self._written, None
            self._is_written.clear()
            assert written is not None
            await self._publish_one(written.order, written.layout)

    async def _publish_one(self, order: SnapshotWritten, layout: tuple[TensorSpec, ...]) -> None:
        base = None
        if self._shelf.newest_version != NO_VERSION:
            base = self._shelf.newest(), self._slots.memory(self._shelf.newest_slot)
        self._slots.follow(order.slot, order.descriptor)
        data = self._slots.memory(order.slot)[: order.num_bytes]
        built = await self._builder.build(order.version, data, layout, base, order.canary)
        self._shelf.put(built.manifest, order.slot)
        self._deltas.put(base[0] if base is not None else None, built.manifest, built.delta)
        await self._release()
        ready = SnapshotReady(
            version=order.version,
            full_bytes=built.manifest.num_bytes,
            delta_bytes=len(built.delta.data) if built.delta is not None else None,
            encode_s=built.seconds,
            overtaken_versions=self._overtaken_versions,
            full_pulls=dict(self._deltas.full_pulls),
        )
        await self._learner.send(encode(ready))

    @property
    def newest_version(self) -> int:
        return self._shelf.newest_version

    def offer(self, request: ManifestRequest | MappingRequest) -> Frames | None:
        """See SnapshotSource."""
        if isinstance(request, MappingRequest) and request.host != host_id():
            return encode(OtherHost())
        newest = self._shelf.newest_version
        if newest == NO_VERSION or newest <= request.newer_than:
            return None
        if isinstance(request, MappingRequest):
            return self._mapping_reply(request)
        if self._base_model is not None and not self._base_model.is_held_by(request):
            return self._base_model.reply()
        step = self._deltas.after(request.held_version)
        if isinstance(step, Delta):
            reply = DeltaReply(version=step.manifest.version, base_version=request.held_version)
            return encode(reply, encode_delta_manifest(step.manifest))
        return encode(ManifestReply(version=newest, why_full=step), encode_manifest(self._shelf.newest()))

    def _mapping_reply(self, request: MappingRequest) -> Frames:
        if self._base_model is not None and not self._base_model.is_held_by(request):
            return self._base_model.mapping_reply()
        process, descriptor, inode = self._slots.place(self._shelf.newest_slot)
        reply = MappingReply(version=self._shelf.newest_version, process=process, descriptor=descriptor, inode=inode)
        return encode(reply, encode_manifest(self._shelf.newest()))

    def chunk(self, peer: bytes, request: ChunkRequest) -> Frame | None:
        """See SnapshotSource."""
        if request.version == NO_VERSION:
            return self._base_model.chunk(request.index) if self._base_model is not None else None
        if request.base_version == NO_VERSION:
            return self._full_chunk(peer, request)
        return self._deltas.chunk(request.base_version, request.version, request.index)

    def _full_chunk(self, peer: bytes, request: ChunkRequest) -> bytes | None:
        slot = self._shelf.request_chunk(peer, request.version, request.index, time.monotonic())
        if slot is None:
            return None
        start, end = self._shelf.manifest(request.version).chunk_range(request.index)
        # A copy: the slot may be written again while the message still waits in the socket.
        return bytes(self._slots.memory(slot)[start:end])

    async def _release_slots(self) -> None:
        while True:
            await asyncio.sleep(RELEASE_INTERVAL_S)
            await self._release()

    async def _release(self) -> None:
        for slot in self._shelf.release(time.monotonic()):
            await self._learner.send(encode(SlotReleased(slot=slot)))


async def serve(settings: SnapshotServerSettings) -> int:
    keys = load_server_keys(Path(settings.keys_directory)) if settings.keys_directory else None
    base_model = None
    if settings.base_model is not None:
        base_model = ServedBaseModel(settings.base_model, run_id=settings.run_id, chunk_bytes=settings.chunk_bytes)
    adapter = base_model.adapter if base_model is not None else None
    slots = SlotMaps(settings.parent_pid, settings.slot_descriptors, settings.slot_bytes)
    async with (
        open_router(settings.listen, keys=keys, max_frame_bytes=MAX_REQUEST_BYTES) as servers,
        open_dealer(settings.learner_socket, max_frame_bytes=MAX_LAYOUT_BYTES) as learner,
    ):
        await learner.send(encode(SnapshotsListening(address=servers.address)))
        with closing(SnapshotBuilder(settings.run_id, settings.chunk_bytes, adapter)) as builder:
            await SnapshotService(builder, servers, learner, slots, base_model).run()
    return 0


def main() -> NoReturn:
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=SnapshotServerSettings)
    die_with_parent(settings.parent_pid)
    configure_logging("snapshots")
    leave(run_until_stopped(lambda: serve(settings)))


if __name__ == "__main__":
    main()
