"""WeightReceiver: pulls each new version in the background, verifies it, and only then has the engine apply it.

A delta when the learner's side has one for what this server holds, else the full snapshot. Chunk by chunk, several
requests in flight, into warm memory; a delta is decoded while it arrives. A cut connection costs the chunks in flight
and nothing else: what was verified stays. Generation goes on until the engine itself pauses to apply.
"""

import asyncio
import logging
import time
from dataclasses import dataclass

from common import messages
from common.delta import DeltaManifest, decode_delta_manifest
from common.events import EventLog
from common.lifecycle import DedicatedThread
from common.snapshot import (
    NO_VERSION,
    SnapshotError,
    SnapshotManifest,
    decode_manifest,
)
from common.wire import Dealer
from rollout_server.delta_decoding import DeltaDecoder
from rollout_server.host_copy import HostCopy
from rollout_server.inference import EngineError, InferenceEngine, LocalChanges, LocalSnapshot
from rollout_server.pulling import PullState
from rollout_server.snapshot_client import PullGivenUp, SnapshotClient

logger = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 5.0
ASK_AGAIN_S = 0.2  # after an answer that was of no use
OVERTAKE_ABOVE = 0.5  # share of a full snapshot still missing, for a newer version to be pulled in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledSnapshot:
    """A version that is complete in the host copy, and what it took to get there."""

    manifest: SnapshotManifest
    form: str  # for people: a delta, or why it was a full snapshot
    num_bytes: int
    changes: LocalChanges | None


Offer = tuple[SnapshotManifest | DeltaManifest, str]


class WeightReceiver:
    """Keeps the engine at the newest published snapshot of the run."""

    def __init__(self, engine: InferenceEngine, events: EventLog) -> None:
        self._engine = engine
        self._events = events
        self._copy = HostCopy()
        self._decoding = DedicatedThread("weights")
        self._client = SnapshotClient()
        self._changed = asyncio.Condition()
        self._run_id = ""
        self.loaded_version = NO_VERSION
        self.published_version = NO_VERSION
        self.paused_s = 0.0  # time the engine was paused for updates, since the start
        self.deltas_loaded = 0
        self.full_loaded = 0
        self._gave_up = False  # the pull before this one

    def __repr__(self) -> str:
        return f"<WeightReceiver at version {self.loaded_version}, published {self.published_version}>"

    @property
    def received_bytes(self) -> int:
        """Of chunks that were taken, since the start."""
        return self._client.received_bytes

    def close(self) -> None:
        self._decoding.close()
        self._copy.close()

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
            pulled = await self._pull(dealer)
            if pulled is None:
                await asyncio.sleep(ASK_AGAIN_S)
            elif run_id == self._run_id:
                await self._apply(pulled)

    async def _pull(self, dealer: Dealer) -> PulledSnapshot | None:
        """Bring the host copy to the next version; None when that turned out to be gone or not ours.

        Whatever fails, the next pull is a full one.
        """
        offer = await self._request_manifest(dealer)
        if offer is None:
            return None
        manifest, form = offer
        try:
            if isinstance(manifest, DeltaManifest):
                return await self._pull_delta(dealer, manifest)
            return await self._pull_full(dealer, manifest, form)
        except SnapshotError as error:
            self._copy.manifest = None
            logger.warning("not loaded, the full snapshot is next: %s", error)
        except PullGivenUp as reason:
            logger.info("%s is given up after %s", manifest.title, reason)
        return None

    async def _pull_full(self, dealer: Dealer, manifest: SnapshotManifest, form: str) -> PulledSnapshot:
        self._copy.begin(manifest.num_bytes)
        pull = self._begin(manifest)
        while pull.missing:
            if self._is_overtaken(pull):
                self._gave_up = True
                raise PullGivenUp(f"{pull.num_bytes_received / 1e6:.1f} MB: {self.published_version} is published")
            arrived = await self._client.next_chunk(dealer, pull)
            if arrived is not None:
                self._copy.write(manifest.chunk_range(arrived[0])[0], arrived[1])
        self._copy.manifest = manifest
        self.full_loaded += 1
        return PulledSnapshot(manifest=manifest, form=form, num_bytes=pull.num_bytes_received, changes=None)

    async def _pull_delta(self, dealer: Dealer, manifest: DeltaManifest) -> PulledSnapshot:
        decoder = DeltaDecoder(manifest, self._copy)
        pull = self._begin(manifest, manifest.base_version)
        while pull.missing:
            arrived = await self._client.next_chunk(dealer, pull)
            if arrived is not None:
                decoder.add(*arrived)
                await self._decoding.run(decoder.decode_arrived)
        changes = await self._decoding.run(self._copy.apply, manifest, decoder.changes)
        self.deltas_loaded += 1
        return PulledSnapshot(
            manifest=manifest.target, form="delta", num_bytes=pull.num_bytes_received, changes=changes
        )

    def _begin(self, manifest: SnapshotManifest | DeltaManifest, base_version: int = NO_VERSION) -> PullState:
        return PullState(
            manifest=manifest,
            version=manifest.version,
            base_version=base_version,
            timeout_s=REPLY_TIMEOUT_S,
            heard_s=time.monotonic(),
        )

    def _is_overtaken(self, pull: PullState) -> bool:
        """Never twice in a row: a server slower than the learner must get somewhere too."""
        return self.published_version > pull.version and pull.share_missing > OVERTAKE_ABOVE and not self._gave_up

    def _held_version(self) -> int:
        """What a delta may start from."""
        held = self._copy.manifest
        if held is None or held.run_id != self._run_id or held.version != self.loaded_version:
            return NO_VERSION
        return held.version

    async def _request_manifest(self, dealer: Dealer) -> Offer | None:
        request = messages.ManifestRequest(newer_than=self.loaded_version, held_version=self._held_version())
        reply = await self._client.ask(dealer, request, REPLY_TIMEOUT_S)
        if reply is None:
            return None
        try:
            return self._read_offer(*reply)
        except SnapshotError as error:
            self._copy.manifest = None
            logger.warning("not loaded, asking again: %s", error)
            return None

    def _read_offer(self, reply: messages.Message, payload: memoryview) -> Offer | None:
        """Raises SnapshotError for what must never be loaded."""
        match reply:
            case messages.ManifestReply(why_full=why):
                manifest = decode_manifest(payload)
                self._check(manifest)
                return manifest, f"full, {why}"
            case messages.DeltaReply():
                delta = decode_delta_manifest(payload)
                self._check(delta.target)
                return delta, "delta"
        return None

    def _check(self, manifest: SnapshotManifest) -> None:
        """Raises SnapshotError for what must never be loaded."""
        if manifest.run_id != self._run_id:
            raise SnapshotError(f"snapshot {manifest.version} is of run {manifest.run_id}, not of {self._run_id}")
        if manifest.version <= self.loaded_version:
            raise SnapshotError(f"asked for a version after {self.loaded_version}, was given {manifest.version}")
        if manifest.version > self.published_version:  # the coordinator would not believe in tokens sampled with it
            raise SnapshotError(f"snapshot {manifest.version} is not announced yet, {self.published_version} is")

    async def _apply(self, pulled: PulledSnapshot) -> None:
        manifest = pulled.manifest
        snapshot = LocalSnapshot(manifest=manifest, path=self._copy.path, changes=pulled.changes)
        with self._events.interval(
            "weight_update", version=manifest.version, num_bytes=pulled.num_bytes, form=pulled.form
        ) as fields:
            try:
                update = await self._engine.load_weights(snapshot)
            except EngineError as error:
                # Half-applied weights are repaired by applying the whole snapshot once more; twice is not bad luck.
                logger.warning("applying snapshot %d failed, once more: %s", manifest.version, error)
                whole = LocalSnapshot(manifest=manifest, path=self._copy.path)
                update = await self._engine.load_weights(whole)
            fields["pause_s"] = update.pause_s
        self.paused_s += update.pause_s
        self._gave_up = False
        async with self._changed:
            self.loaded_version = manifest.version
            self._changed.notify_all()
        logger.info(
            "at version %d, %d behind: %.1f kB (%s) of %.1f kB pulled, paused for %.0f ms",
            *(manifest.version, max(0, self.published_version - manifest.version), pulled.num_bytes / 1e3),
            *(pulled.form, manifest.num_bytes / 1e3, update.pause_s * 1e3),
        )
