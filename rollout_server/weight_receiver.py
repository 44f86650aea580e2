"""WeightReceiver: pulls each new snapshot in the background, verifies it, and only then has the engine apply it.

Pull, chunk by chunk, several requests in flight, into warm memory. A cut connection costs the chunks in flight and
nothing else: what was verified stays. Generation goes on until the engine itself pauses to apply.
"""

import asyncio
import logging
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from common import messages
from common.codec import Decoder, ProtocolError, encode
from common.events import EventLog
from common.snapshot import (
    MAX_MANIFEST_BYTES,
    NO_VERSION,
    SnapshotError,
    SnapshotManifest,
    decode_manifest,
    verify_chunk,
)
from common.wire import Dealer
from rollout_server.inference import EngineError, InferenceEngine, LocalSnapshot

logger = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT = 8
REPLY_TIMEOUT_S = 5.0
ASK_AGAIN_S = 0.2  # after an answer that was of no use


class Staging:
    """Memory a snapshot is pulled into: an anonymous file that vanishes with this process, reused while it fits.

    Other processes of this user read it by `path`.
    """

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("countercurrent-snapshot")
        self._mapping: mmap.mmap | None = None

    @property
    def path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    def resize(self, num_bytes: int) -> None:
        if self._mapping is not None and len(self._mapping) == num_bytes:
            return
        self._unmap()
        os.ftruncate(self._descriptor, num_bytes)
        self._mapping = mmap.mmap(self._descriptor, num_bytes)

    def write(self, start: int, data: bytes | memoryview) -> None:
        assert self._mapping is not None
        self._mapping[start : start + len(data)] = data

    def close(self) -> None:
        self._unmap()
        os.close(self._descriptor)

    def _unmap(self) -> None:
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None


@dataclass(kw_only=True)
class PullState:
    """How far the pull of one snapshot has come."""

    manifest: SnapshotManifest
    missing: set[int]
    in_flight: dict[int, float]  # chunk index -> when it was asked for
    started_s: float
    num_bytes_received: int = 0

    def next_requests(self, now_s: float) -> list[int]:
        """Chunks to ask for now: new ones up to the window, and those whose answer is overdue."""
        overdue = [index for index, asked_s in self.in_flight.items() if now_s - asked_s > REPLY_TIMEOUT_S]
        room = CHUNKS_IN_FLIGHT - len(self.in_flight)
        fresh = sorted(self.missing - self.in_flight.keys())[: max(room, 0)]
        return overdue + fresh


class WeightReceiver:
    """Keeps the engine at the newest published snapshot of the run."""

    def __init__(self, engine: InferenceEngine, events: EventLog) -> None:
        self._engine = engine
        self._events = events
        self._staging = Staging()
        self._replies = Decoder(messages.SnapshotsToServer, max_payload_bytes=MAX_MANIFEST_BYTES)
        self._changed = asyncio.Condition()
        self._run_id = ""
        self.loaded_version = NO_VERSION
        self.published_version = NO_VERSION
        self.paused_s = 0.0  # time the engine was paused for updates, since the start
        self.received_bytes = 0

    def __repr__(self) -> str:
        return f"<WeightReceiver at version {self.loaded_version}, published {self.published_version}>"

    def close(self) -> None:
        self._staging.close()

    async def follow(self, run_id: str) -> None:
        """Versions of another run, or of another life of this run, mean nothing here: start over."""
        async with self._changed:
            if run_id != self._run_id:
                self._run_id = run_id
                self.loaded_version = self.published_version = NO_VERSION
                self._changed.notify_all()

    async def announce(self, published_version: int) -> None:
        """The learner published `published_version`; it will be pulled when what is being pulled is done."""
        async with self._changed:
            self.published_version = max(self.published_version, published_version)
            self._changed.notify_all()

    async def wait_for_version(self, version: int) -> None:
        """Returns once weights of at least `version` are loaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.loaded_version >= max(version, 0))

    async def run(self, dealer: Dealer) -> None:
        """Pull and apply for ever. Raises EngineError when the weights cannot be brought into a known state."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self.published_version > self.loaded_version)
            run_id = self._run_id
            manifest = await self._pull(dealer)
            if manifest is None:
                await asyncio.sleep(ASK_AGAIN_S)
            elif run_id == self._run_id:
                await self._apply(manifest)

    async def _pull(self, dealer: Dealer) -> SnapshotManifest | None:
        """Pull the newest snapshot into the staging memory; None when it turned out to be gone or not ours."""
        manifest = await self._request_manifest(dealer)
        if manifest is None:
            return None
        self._staging.resize(manifest.num_bytes)
        pull = PullState(
            manifest=manifest, missing=set(range(manifest.num_chunks)), in_flight={}, started_s=time.monotonic()
        )
        while pull.missing:
            for index in pull.next_requests(time.monotonic()):
                await dealer.send(encode(messages.ChunkRequest(version=manifest.version, index=index)))
                pull.in_flight[index] = time.monotonic()
            reply = await self._receive(dealer, "a chunk")
            if reply is not None and not self._take(pull, *reply):
                return None
        self.received_bytes += pull.num_bytes_received
        return manifest

    async def _request_manifest(self, dealer: Dealer) -> SnapshotManifest | None:
        await dealer.send(encode(messages.ManifestRequest(newer_than=self.loaded_version)))
        reply = await self._receive(dealer, "the manifest")
        while reply is not None and isinstance(reply[0], messages.ChunkReply | messages.SnapshotGone):
            reply = await self._receive(dealer, "the manifest")  # that was a late answer to a pull given up
        if reply is None or not isinstance(reply[0], messages.ManifestReply):
            return None
        try:
            manifest = decode_manifest(reply[1])
            self._check(manifest)
        except SnapshotError as error:
            logger.warning("not loaded, asking again: %s", error)
            return None
        return manifest

    def _check(self, manifest: SnapshotManifest) -> None:
        """Raises SnapshotError for what must never be loaded."""
        if manifest.run_id != self._run_id:
            raise SnapshotError(f"snapshot {manifest.version} is of run {manifest.run_id}, not of {self._run_id}")
        if manifest.version <= self.loaded_version:
            raise SnapshotError(f"asked for a version after {self.loaded_version}, was given {manifest.version}")
        if manifest.version > self.published_version:  # the coordinator would not believe in tokens sampled with it
            raise SnapshotError(f"snapshot {manifest.version} is not announced yet, {self.published_version} is")

    async def _receive(self, dealer: Dealer, what: str) -> tuple[messages.Message, memoryview] | None:
        try:
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                frames = await dealer.receive()
        except TimeoutError:
            logger.info("waiting for %s of snapshot %d from %r", what, self.published_version, dealer)
            return None
        try:
            return self._replies.decode(frames)
        except ProtocolError as error:
            logger.warning("the snapshot server sent what is not a reply: %s", error)
            return None

    def _take(self, pull: PullState, reply: messages.Message, payload: memoryview) -> bool:
        """Returns False when the snapshot being pulled is gone."""
        version = pull.manifest.version
        if isinstance(reply, messages.SnapshotGone) and reply.version == version:
            return False
        if not isinstance(reply, messages.ChunkReply) or reply.version != version or reply.index not in pull.missing:
            return True  # an answer to something asked earlier
        pull.in_flight.pop(reply.index, None)
        try:
            verify_chunk(pull.manifest, reply.index, payload)
        except SnapshotError as error:
            logger.warning("%s", error)
            return True
        self._staging.write(pull.manifest.chunk_range(reply.index)[0], payload)
        pull.missing.discard(reply.index)
        pull.num_bytes_received += len(payload)
        return True

    async def _apply(self, manifest: SnapshotManifest) -> None:
        snapshot = LocalSnapshot(manifest=manifest, path=self._staging.path)
        with self._events.interval("weight_update", version=manifest.version, num_bytes=manifest.num_bytes) as fields:
            try:
                update = await self._engine.load_weights(snapshot)
            except EngineError as error:
                # Half-applied weights are repaired by applying the whole snapshot once more; twice is not bad luck.
                logger.warning("applying snapshot %d failed, once more: %s", manifest.version, error)
                update = await self._engine.load_weights(snapshot)
            fields["pause_s"] = update.pause_s
        self.paused_s += update.pause_s
        async with self._changed:
            self.loaded_version = manifest.version
            self._changed.notify_all()
        logger.info("at version %d, paused for %.0f ms", manifest.version, update.pause_s * 1e3)
