"""JournalKeeper: the journal beside the event loop. What waits is written together."""

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from common.lifecycle import DedicatedThread
from common.messages import GroupHeader
from learner.coordinator.journal import Journal, Record
from learner.coordinator.ledger import FrontierState, PastLeases
from learner.coordinator.recovery import JournalContents

logger = logging.getLogger(__name__)


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

    async def keep(self, records: Sequence[Record], past: PastLeases) -> None:
        """Returns when the records are on the disk. Raises JournalError."""
        await self._thread.run(self._journal.commit, records, past)

    async def read(self, lease_ids: Sequence[int]) -> dict[int, tuple[GroupHeader, bytes]]:
        """Header and payload by lease. Raises JournalError when one is missing."""
        return await self._thread.run(self._journal.read, lease_ids)


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
