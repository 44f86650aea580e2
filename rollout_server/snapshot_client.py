"""SnapshotClient: the requests to a snapshot server, and what of its answers is believed."""

import asyncio
import logging
import time

from common import messages
from common.codec import Decoder, ProtocolError, encode
from common.snapshot import MAX_MANIFEST_BYTES, SnapshotError, verify_chunk
from common.weight_messages import (
    ChunkLater,
    ChunkReply,
    ChunkRequest,
    ManifestRequest,
    MappingRequest,
    SnapshotGone,
    SnapshotsToServer,
)
from common.wire import Dealer
from rollout_server.pulling import PullState

logger = logging.getLogger(__name__)

LATER_S = 0.01  # before what a relay does not have yet is asked for again

Reply = tuple[messages.Message, memoryview]


class PullGivenUp(Exception):
    """The version being pulled is gone, or a newer one is there and much of this one is not."""


class DamagedChunkError(SnapshotError):
    """What came as chunk `index` is not it."""

    def __init__(self, index: int, what: SnapshotError) -> None:
        super().__init__(str(what))
        self.index = index


class SnapshotClient:
    """What it is sent only raises where a version is gone or a chunk is damaged; silence and nonsense are None."""

    def __init__(self) -> None:
        self._replies = Decoder(SnapshotsToServer, max_payload_bytes=MAX_MANIFEST_BYTES)
        self.received_bytes = 0  # of chunks that were taken

    async def ask(self, dealer: Dealer, request: ManifestRequest | MappingRequest, timeout_s: float) -> Reply | None:
        """The answer to a request for a manifest; late answers to earlier pulls are passed over."""
        await dealer.send(encode(request))
        reply = await self._receive(dealer, "the manifest", timeout_s)
        while reply is not None and isinstance(reply[0], ChunkReply | SnapshotGone):
            reply = await self._receive(dealer, "the manifest", timeout_s)
        return reply

    async def next_chunk(self, dealer: Dealer, pull: PullState, timeout_s: float) -> tuple[int, memoryview] | None:
        """Ask for what is to be asked for, and take one answer: (index, bytes) of a verified chunk, or None.

        Raises PullGivenUp when what is pulled is gone, DamagedChunkError for a chunk that is another's.
        """
        for index in pull.next_requests(time.monotonic()):
            request = ChunkRequest(
                version=pull.version, index=index, base_version=pull.base_version, digest=pull.manifest.digest
            )
            await dealer.send(encode(request))
        reply = await self._receive(dealer, f"chunks of {pull.manifest.title}", timeout_s)
        if reply is None:
            return None
        message, payload = reply
        if isinstance(message, SnapshotGone) and message.version == pull.version:
            raise PullGivenUp(f"{pull.num_bytes_received / 1e6:.1f} MB: it is gone, {message.newest} is the newest")
        if not isinstance(message, ChunkReply | ChunkLater) or message.index not in pull.missing:
            return None  # an answer to something asked earlier
        if (message.version, message.base_version) != (pull.version, pull.base_version):
            return None
        if isinstance(message, ChunkLater):
            pull.damaged(message.index, time.monotonic())
            await asyncio.sleep(LATER_S)
            return None
        try:
            verify_chunk(pull.manifest, message.index, payload)
        except SnapshotError as error:
            raise DamagedChunkError(message.index, error) from error
        pull.arrived(message.index, len(payload), time.monotonic())
        self.received_bytes += len(payload)
        return message.index, payload

    async def _receive(self, dealer: Dealer, what: str, timeout_s: float) -> Reply | None:
        try:
            async with asyncio.timeout(timeout_s):
                frames = await dealer.receive()
        except TimeoutError:
            logger.info("waiting for %s from %r", what, dealer)
            return None
        try:
            return self._replies.decode(frames)
        except ProtocolError as error:
            logger.warning("the snapshot server sent what is not a reply: %s", error)
            return None
