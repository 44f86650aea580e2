"""JournalKeeper: the journal beside the event loop. What waits is written together, and promised only then."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from common.lifecycle import DedicatedThread
from common.messages import GroupHeader
from learner.coordinator.decisions import AcceptGroup, DeliverBatch, RefuseGroup
from learner.coordinator.journal import Journal, Record
from learner.coordinator.ledger import FrontierState, PastLeases
from learner.coordinator.outbound import Promise
from learner.coordinator.recovery import JournalContents
from learner.coordinator.replay_queue import FinishedGroup, JournaledGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedBatch:
    """A batch with its bytes, as the learner is sent it."""

    version: int
    headers: tuple[GroupHeader, ...]
    accepted_versions: tuple[int, ...]
    payload: bytes


class JournalKeeper:
    """Group commit on a thread of its own: while one transaction waits for the disk, the next one gathers."""

    def __init__(self, journal: Journal, thread: DedicatedThread, *, lineage: str) -> None:
        self._journal = journal
        self._thread = thread
        self._lineage = lineage

    @property
    def is_of_this_life(self) -> bool:
        """Whether a coordinator of the same learner wrote it: servers may hold leases of that one."""
        return self._journal.lineage_before == self._lineage

    async def contents(self, frontier: FrontierState, *, is_new_run: bool) -> JournalContents:
        """What to go on from. Of a life of the run that is not continued nothing is left."""
        contents = await self._thread.run(self._journal.contents)
        foreign = is_new_run and not self.is_of_this_life
        if foreign or contents.forgotten_up_to > frontier.version:
            if contents.groups:
                logger.warning(
                    "%d groups in the journal are of a later checkpoint than the one to go on from: they are sampled "
                    "again",
                    len(contents.groups),
                )
            await self._thread.run(self._journal.clear)
            return JournalContents()
        if contents.groups:
            delivered = sum(group.batch_version is not None for group in contents.groups)
            logger.info("journal: %d groups, %d of them delivered before", len(contents.groups), delivered)
        return contents

    async def keep(
        self, records: Sequence[Record], promises: Sequence[Promise], past: PastLeases
    ) -> list[AcceptGroup | RefuseGroup | LoadedBatch]:
        """The promises, to be told now that the records are on the disk. Raises JournalError."""
        return await self._thread.run(self._keep, records, promises, past)

    def _keep(
        self, records: Sequence[Record], promises: Sequence[Promise], past: PastLeases
    ) -> list[AcceptGroup | RefuseGroup | LoadedBatch]:
        self._journal.commit(records, past)
        return [self._load(promise) if isinstance(promise, DeliverBatch) else promise for promise in promises]

    def _load(self, batch: DeliverBatch) -> LoadedBatch:
        on_disk = [group.lease_id for group in batch.groups if isinstance(group, JournaledGroup)]
        stored = self._journal.read(on_disk)
        contents = [
            (group.header, group.payload) if isinstance(group, FinishedGroup) else stored[group.lease_id]
            for group in batch.groups
        ]
        return LoadedBatch(
            version=batch.version,
            headers=tuple(header for header, _ in contents),
            accepted_versions=tuple(group.accepted_version for group in batch.groups),
            payload=b"".join(payload for _, payload in contents),
        )


@asynccontextmanager
async def open_journal(path: Path, *, lineage: str) -> AsyncIterator[JournalKeeper]:
    """Raises JournalError when it cannot be used."""
    thread = DedicatedThread("journal")
    try:
        journal = await thread.run(Journal, path, lineage=lineage)
        try:
            yield JournalKeeper(journal, thread, lineage=lineage)
        finally:
            await thread.run(journal.close)
    finally:
        thread.close()
