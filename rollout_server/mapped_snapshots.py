"""MappedSnapshots: versions read where the learner wrote them, in its own memory, by servers on its host.

Nothing is copied before the engine copies it. The bytes are verified like any others, under a lock that keeps the
learner from writing there until the engine has them.
"""

import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from common.lifecycle import DedicatedThread
from common.shared_slots import (
    NotSharedError,
    host_id,
    lock_to_read,
    map_slot,
    open_slot_of,
    unlock,
)
from common.snapshot import NO_VERSION, SnapshotError, SnapshotManifest, decode_manifest, verify_all
from common.weight_messages import MappingReply, MappingRequest, OtherHost
from common.wire import Dealer
from rollout_server.relay import Relaying
from rollout_server.snapshot_client import SnapshotClient
from rollout_server.snapshot_transport import ArrivedSnapshot, WeightTarget

logger = logging.getLogger(__name__)

REPLY_TIMEOUT_S = 5.0
MAX_FAILURES = 3  # in a row, of what was offered and is then not there


class MappedSnapshots:
    """A SnapshotTransport. Raises NotSharedError where the learner's memory cannot be mapped."""

    def __init__(self, target: WeightTarget, client: SnapshotClient, relaying: Relaying) -> None:
        """relaying: takes no part here, where nothing is held."""
        self._target = target
        self._client = client
        self._verifying = DedicatedThread("weights")
        self._failures = 0

    def __repr__(self) -> str:
        return f"<MappedSnapshots, {self._failures} failures>"

    def close(self) -> None:
        self._verifying.close()

    def forget(self) -> None:
        """Nothing is held here: every version comes whole."""

    @asynccontextmanager
    async def next_version(self, dealer: Dealer) -> AsyncIterator[ArrivedSnapshot | None]:
        """See SnapshotTransport."""
        offer = await self._request(dealer)
        if offer is None:
            yield None
            return
        manifest, descriptor = offer
        try:
            # A newer version may be written there already; then there is nothing to wait for.
            yield await self._verified(manifest, descriptor) if lock_to_read(descriptor) else None
        finally:
            unlock(descriptor)
            os.close(descriptor)  # nothing is kept of a learner that may be gone by then

    async def _request(self, dealer: Dealer) -> tuple[SnapshotManifest, int] | None:
        """What is offered, and a descriptor of where it lies; to be closed."""
        request = MappingRequest(
            newer_than=self._target.loaded_version, host=host_id(), base_model=self._target.base_model
        )
        reply = await self._client.ask(dealer, request, REPLY_TIMEOUT_S)
        if reply is None:
            return None
        message, payload = reply
        if isinstance(message, OtherHost):
            raise NotSharedError("the learner is on another host")
        if not isinstance(message, MappingReply):
            return None
        try:
            manifest = decode_manifest(payload)
            if message.version == NO_VERSION:
                self._target.check_base_model(manifest)
            else:
                self._target.check(manifest)
        except SnapshotError as error:
            logger.warning("not loaded, asking again: %s", error)
            return None
        return manifest, open_slot_of(message.process, message.descriptor, message.inode, manifest.num_bytes)

    async def _verified(self, manifest: SnapshotManifest, descriptor: int) -> ArrivedSnapshot | None:
        try:
            await self._verifying.run(_verify, manifest, descriptor)
        except SnapshotError as error:  # it was written again before the lock was had
            self._failures += 1
            logger.warning("not loaded, asking again: %s", error)
            if self._failures >= MAX_FAILURES:
                raise NotSharedError(f"the learner's memory is not what its manifest says: {error}") from error
            return None
        self._failures = 0
        path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        return ArrivedSnapshot(manifest=manifest, path=path, form="shared memory", num_bytes=0)


def _verify(manifest: SnapshotManifest, descriptor: int) -> None:
    """Raises SnapshotError unless what lies there is the version, bit for bit."""
    verify_all(manifest, memoryview(map_slot(descriptor, manifest.num_bytes)))
