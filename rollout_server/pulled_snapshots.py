"""PulledSnapshots: versions pulled over ZeroMQ into this process's own copy, from whatever host.

A delta when the learner's side has one for what this server holds, else the full snapshot. Chunk by chunk, several
requests in flight, into memory that is kept; a delta is decoded while it arrives. Chunks are written and decoded by a
thread, beside the event loop and the transfer. A cut connection costs the chunks in flight and nothing else: what was
verified stays.
"""

import logging
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext

from common import messages
from common.delta import DeltaManifest, decode_delta_manifest
from common.lifecycle import DedicatedThread
from common.snapshot import NO_VERSION, SnapshotError, SnapshotManifest, decode_manifest
from common.weight_messages import BaseModelReply, DeltaReply, ManifestReply, ManifestRequest
from common.wire import Dealer
from rollout_server.chunk_sources import ChunkSources
from rollout_server.delta_decoding import DeltaDecoder
from rollout_server.host_copy import HostCopy
from rollout_server.pulling import PullState
from rollout_server.relay import Relaying
from rollout_server.snapshot_client import PullGivenUp, SnapshotClient
from rollout_server.snapshot_transport import ArrivedSnapshot, WeightTarget

logger = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 5.0
OVERTAKE_ABOVE = 0.5  # share of a full snapshot still missing, for a newer version to be pulled in its place

Offer = tuple[SnapshotManifest | DeltaManifest, str]


class PulledSnapshots:
    """A SnapshotTransport. Whatever fails, the next pull is a full one."""

    def __init__(self, target: WeightTarget, client: SnapshotClient, relaying: Relaying) -> None:
        self._target = target
        self._client = client
        self._upstream = relaying.upstream
        self._shelf = relaying.shelf
        self._copy = HostCopy()
        self._writing = DedicatedThread("weights")  # into the copy
        self._gave_up = False  # the pull before this one

    def __repr__(self) -> str:
        return f"<PulledSnapshots, {self._copy!r}>"

    def close(self) -> None:
        self._shelf.withdraw()
        self._writing.close()
        self._copy.close()

    def forget(self) -> None:
        self._shelf.withdraw()
        self._copy.manifest = None

    @asynccontextmanager
    async def next_version(self, dealer: Dealer) -> AsyncIterator[ArrivedSnapshot | None]:
        """See SnapshotTransport."""
        yield await self._pull(dealer)

    async def _pull(self, dealer: Dealer) -> ArrivedSnapshot | None:
        """Bring the copy to the next version; None when that turned out to be gone or not ours."""
        await self._upstream.settled()
        offer = await self._request_manifest(dealer)
        if offer is None:
            return None
        manifest, form = offer
        try:
            async with self._sources(dealer, manifest) as sources:
                if isinstance(manifest, DeltaManifest):
                    arrived = await self._pull_delta(sources, manifest)
                else:
                    arrived = await self._pull_full(sources, manifest, form)
        except SnapshotError as error:
            self.forget()
            logger.warning("not loaded, the full snapshot is next: %s", error)
        except PullGivenUp as reason:
            self._shelf.withdraw()
            self._gave_up = True
            logger.info("%s is given up after %s", manifest.title, reason)
        else:
            self._gave_up = False
            return arrived
        return None

    def _sources(
        self, learner: Dealer, manifest: SnapshotManifest | DeltaManifest
    ) -> AbstractAsyncContextManager[ChunkSources]:
        """The learner alone for what no relay has, and once after a pull was given up: to get somewhere for certain."""
        if self._gave_up or manifest.version == NO_VERSION:
            return nullcontext(ChunkSources(self._upstream, self._client, learner))
        return self._upstream.sources(self._client, learner, manifest.chunk_bytes)

    async def _pull_full(self, sources: ChunkSources, manifest: SnapshotManifest, form: str) -> ArrivedSnapshot:
        self._shelf.withdraw()
        await self._writing.run(self._copy.begin, manifest.num_bytes)
        pull = self._begin(manifest)
        if not manifest.is_base_model:
            self._shelf.begin(manifest, self._copy.memory)
        while pull.missing:
            if self._is_overtaken(pull):
                newest = self._target.published_version
                raise PullGivenUp(f"{pull.num_bytes_received / 1e6:.1f} MB: {newest} is published")
            arrived = await sources.next_chunk(pull)
            if arrived is not None:
                index, data = arrived
                await self._writing.run(self._copy.write, manifest.chunk_range(index)[0], data)
                self._shelf.arrived(index)
        self._copy.manifest = manifest
        return ArrivedSnapshot(manifest=manifest, path=self._copy.path, form=form, num_bytes=pull.num_bytes_received)

    async def _pull_delta(self, sources: ChunkSources, manifest: DeltaManifest) -> ArrivedSnapshot:
        decoder = DeltaDecoder(manifest, self._copy)
        self._shelf.begin(manifest, decoder.data)
        pull = self._begin(manifest, manifest.base_version)
        while pull.missing:
            arrived = await sources.next_chunk(pull)
            if arrived is not None:
                decoder.add(*arrived)
                self._shelf.arrived(arrived[0])
                await self._writing.run(decoder.decode_arrived)
        self._shelf.change()
        changes = await self._writing.run(self._copy.apply, manifest, decoder.changes)
        self._shelf.complete(manifest.target, self._copy.memory)
        return ArrivedSnapshot(
            manifest=manifest.target,
            path=self._copy.path,
            form="delta",
            num_bytes=pull.num_bytes_received,
            changes=changes,
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
        """Never twice in a row: a server slower than the learner must get somewhere too. No base model ever is."""
        is_newer = pull.version != NO_VERSION and self._target.published_version > pull.version
        return is_newer and pull.share_missing > OVERTAKE_ABOVE and not self._gave_up

    def _held_version(self) -> int:
        """What a delta may start from."""
        held = self._copy.manifest
        if held is None or held.run_id != self._target.run_id or held.version != self._target.loaded_version:
            return NO_VERSION
        return held.version

    async def _request_manifest(self, dealer: Dealer) -> Offer | None:
        request = ManifestRequest(
            newer_than=self._target.loaded_version,
            held_version=self._held_version(),
            base_model=self._target.base_model,
        )
        reply = await self._client.ask(dealer, request, REPLY_TIMEOUT_S)
        if reply is None:
            return None
        try:
            return self._read_offer(*reply)
        except SnapshotError as error:
            self.forget()
            logger.warning("not loaded, asking again: %s", error)
            return None

    def _read_offer(self, reply: messages.Message, payload: memoryview) -> Offer | None:
        """Raises SnapshotError for what must never be loaded."""
        match reply:
            case ManifestReply(why_full=why):
                manifest = decode_manifest(payload)
                self._target.check(manifest)
                return manifest, f"full, {why}"
            case BaseModelReply():
                manifest = decode_manifest(payload)
                self._target.check_base_model(manifest)
                return manifest, "full, the base model"
            case DeltaReply():
                delta = decode_delta_manifest(payload)
                self._target.check(delta.target)
                return delta, "delta"
        return None
