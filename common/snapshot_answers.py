"""answer_requests: what rollout servers ask for weights, answered by whoever holds them: the publisher, or a relay."""

import logging
from typing import Protocol

from common.codec import Decoder, Frame, Frames, ProtocolError, encode
from common.weight_messages import (
    ChunkLater,
    ChunkReply,
    ChunkRequest,
    ManifestRequest,
    MappingRequest,
    NoNewer,
    ServerToSnapshots,
    SnapshotGone,
)
from common.wire import Incoming, Router

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 1 << 12


class SnapshotSource(Protocol):
    """What is held of snapshots. Only a publisher knows manifests; chunks can come from anybody."""

    @property
    def newest_version(self) -> int:
        """snapshot.NO_VERSION when nothing is held."""
        ...

    def offer(self, request: ManifestRequest | MappingRequest) -> Frames | None:
        """The answer to a request for a manifest; None when there is none that is newer."""
        ...

    def chunk(self, peer: bytes, request: ChunkRequest) -> Frame | None:
        """Bytes that do not change any more; None when they are not held. Raises ChunkLaterError."""
        ...


class ChunkLaterError(Exception):
    """The chunk is on its way to where it was asked for."""


async def answer_requests(servers: Router, source: SnapshotSource) -> None:
    """For ever. A server that cannot take an answer now asks again after its time-out."""
    decoder = Decoder(ServerToSnapshots, max_payload_bytes=0, max_header_bytes=MAX_REQUEST_BYTES)
    while True:
        for incoming in await servers.receive():
            frames = _answer(decoder, source, incoming)
            if frames is not None:
                servers.send(incoming.peer, frames)


def _answer(decoder: Decoder, source: SnapshotSource, incoming: Incoming) -> Frames | None:
    try:
        request, _ = decoder.decode(incoming.frames)
    except ProtocolError as error:
        logger.warning("refused a request for weights: %s", error)
        return None
    if isinstance(request, ChunkRequest):
        return _chunk_reply(source, incoming.peer.routing_id, request)
    assert isinstance(request, ManifestRequest | MappingRequest)
    return source.offer(request) or encode(NoNewer(version=source.newest_version))


def _chunk_reply(source: SnapshotSource, peer: bytes, request: ChunkRequest) -> Frames:
    which = {"version": request.version, "index": request.index, "base_version": request.base_version}
    try:
        chunk = source.chunk(peer, request)
    except ChunkLaterError:
        return encode(ChunkLater(**which))
    if chunk is None:
        return encode(SnapshotGone(version=request.version, newest=source.newest_version))
    return encode(ChunkReply(**which), chunk)
