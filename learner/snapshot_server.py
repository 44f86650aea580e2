"""The process that hashes published snapshots and serves their chunks to rollout servers, beside the next step.

`python -m learner.snapshot_server SETTINGS.json`, started by the learner. The learner writes each snapshot into a
slot of shared memory (an anonymous file that both processes map) and says so; everything else happens here.
"""

import asyncio
import logging
import mmap
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import msgspec

from common import messages
from common.codec import Decoder, ProtocolError, encode
from common.keys import load_server_keys
from common.lifecycle import DedicatedThread, configure_logging, die_with_parent, leave, run_until_stopped
from common.snapshot import NO_VERSION, SnapshotManifest, TensorSpec, build_manifest, encode_manifest
from common.wire import Dealer, Incoming, Router, open_dealer, open_router
from learner.snapshot_shelf import SnapshotShelf

logger = logging.getLogger(__name__)

RELEASE_INTERVAL_S = 0.25
MAX_REQUEST_BYTES = 1 << 12
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


class SnapshotService:
    """SnapshotShelf for many servers at once: adds sockets, hashing on a thread of its own, and the clock."""

    def __init__(
        self, settings: SnapshotServerSettings, servers: Router, learner: Dealer, slots: list[memoryview]
    ) -> None:
        self._run_id = settings.run_id
        self._servers = servers
        self._learner = learner
        self._slots = slots
        self._shelf = SnapshotShelf()
        self._requests = Decoder(messages.ServerToSnapshots, max_payload_bytes=0, max_header_bytes=MAX_REQUEST_BYTES)
        self._orders = Decoder(messages.LearnerToSnapshots, max_payload_bytes=MAX_LAYOUT_BYTES)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._serve_servers())
            tasks.create_task(self._serve_learner())
            tasks.create_task(self._release_slots())

    async def _serve_learner(self) -> None:
        hashing = DedicatedThread("hashing")
        try:
            while True:
                order, layout = self._orders.decode(await self._learner.receive())
                assert isinstance(order, messages.SnapshotWritten)
                manifest = await hashing.run(self._build_manifest, order, layout_decoder.decode(layout))
                self._shelf.put(manifest, order.slot)
                await self._release()
                await self._learner.send(encode(messages.SnapshotReady(version=order.version)))
        finally:
            hashing.close()

    def _build_manifest(self, order: messages.SnapshotWritten, layout: tuple[TensorSpec, ...]) -> SnapshotManifest:
        data = self._slots[order.slot][: order.num_bytes]
        return build_manifest(data, layout, run_id=self._run_id, version=order.version)

    async def _serve_servers(self) -> None:
        while True:
            for incoming in await self._servers.receive():
                self._answer(incoming)

    def _answer(self, incoming: Incoming) -> None:
        try:
            request, _ = self._requests.decode(incoming.frames)
        except ProtocolError as error:
            logger.warning("refused a request for weights: %s", error)
            return
        if isinstance(request, messages.ManifestRequest):
            frames = self._manifest_reply(request)
        else:
            assert isinstance(request, messages.ChunkRequest)
            frames = self._chunk_reply(incoming.peer.routing_id, request)
        # A server that cannot take the answer now asks again after its time-out.
        self._servers.send(incoming.peer, frames)

    def _manifest_reply(self, request: messages.ManifestRequest) -> list[bytes | memoryview]:
        newest = self._shelf.newest_version
        if newest == NO_VERSION or newest <= request.newer_than:
            return encode(messages.NoNewer(version=newest))
        return encode(messages.ManifestReply(version=newest), encode_manifest(self._shelf.newest()))

    def _chunk_reply(self, peer: bytes, request: messages.ChunkRequest) -> list[bytes | memoryview]:
        slot = self._shelf.request_chunk(peer, request.version, request.index, time.monotonic())
        if slot is None:
            return encode(messages.SnapshotGone(version=request.version, newest=self._shelf.newest_version))
        start, end = self._shelf.manifest(request.version).chunk_range(request.index)
        # A copy: the slot may be written again while the message still waits in the socket.
        chunk = bytes(self._slots[slot][start:end])
        return encode(messages.ChunkReply(version=request.version, index=request.index), chunk)

    async def _release_slots(self) -> None:
        while True:
            await asyncio.sleep(RELEASE_INTERVAL_S)
            await self._release()

    async def _release(self) -> None:
        for slot in self._shelf.release(time.monotonic()):
            await self._learner.send(encode(messages.SlotReleased(slot=slot)))


async def serve(settings: SnapshotServerSettings) -> int:
    keys = load_server_keys(Path(settings.keys_directory)) if settings.keys_directory else None
    with ExitStack() as stack:
        slots = []
        for descriptor in settings.slot_descriptors:
            mapping = stack.enter_context(mmap.mmap(descriptor, settings.slot_bytes, prot=mmap.PROT_READ))
            slots.append(stack.enter_context(memoryview(mapping)))
        async with (
            open_router(settings.listen, keys=keys, max_frame_bytes=MAX_REQUEST_BYTES) as servers,
            open_dealer(settings.learner_socket, max_frame_bytes=MAX_LAYOUT_BYTES) as learner,
        ):
            await learner.send(encode(messages.SnapshotsListening(address=servers.address)))
            await SnapshotService(settings, servers, learner, slots).run()
    return 0


def main() -> NoReturn:
    settings = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=SnapshotServerSettings)
    die_with_parent(settings.parent_pid)
    configure_logging("snapshots")
    leave(run_until_stopped(lambda: serve(settings)))


if __name__ == "__main__":
    main()
