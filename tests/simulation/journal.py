"""SimulatedJournal: the journal's promise without its disk. What was committed survives every crash; all else is lost.

It stands where learner.coordinator.journal.Journal does, behind the real JournalKeeper.
"""

from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from common.messages import GroupHeader
from learner.coordinator.dynamic_sampling import first_remembered
from learner.coordinator.journal import BatchRecord, FilteredRecord, ForgetRecord, ParkedRecord, Record
from learner.coordinator.ledger import PastLeases
from learner.coordinator.recovery import JournalContents
from learner.coordinator.replay_queue import FinishedGroup, JournaledGroup

T = TypeVar("T")


class JournalBrokeError(ValueError):
    """A transaction that SQLite would refuse."""


@dataclass(slots=True)
class StoredGroup:
    group: FinishedGroup
    batch_version: int | None = None


class SimulatedJournal:
    """The file, which outlives its coordinators, and the interface of Journal."""

    def __init__(self) -> None:
        self.lineage_before = ""
        self._groups: dict[int, StoredGroup] = {}  # by lease
        self._parked: dict[int, str] = {}
        self._filtered: dict[int, int] = {}  # task -> version
        self._past = PastLeases()
        self._forgotten_up_to = 0
        self._lineage = ""

    def open(self, lineage: str) -> None:
        self.lineage_before, self._lineage = self._lineage, lineage

    def contents(self) -> JournalContents:
        groups = [
            JournaledGroup(
                lease_id=lease_id,
                task_id=stored.group.task_id,
                oldest_version=stored.group.oldest_version,
                newest_version=stored.group.newest_version,
                accepted_version=stored.group.accepted_version,
                batch_version=stored.batch_version,
            )
            for lease_id, stored in sorted(self._groups.items())
        ]
        return JournalContents(
            groups=groups,
            parked=dict(self._parked),
            filtered=dict(self._filtered),
            past=self._past,
            forgotten_up_to=self._forgotten_up_to,
        )

    def commit(self, records: Iterable[Record], past: PastLeases) -> None:
        """Raises JournalBrokeError for what the schema of the real one forbids."""
        for record in records:
            self._write(record)
        self._past = past

    def read(self, lease_ids: Sequence[int]) -> dict[int, tuple[GroupHeader, bytes]]:
        groups = [self._groups[lease_id].group for lease_id in lease_ids]
        return {group.lease_id: (group.header, group.payload) for group in groups}

    def clear(self) -> None:
        self._groups.clear()
        self._parked.clear()
        self._filtered.clear()
        self._past, self._forgotten_up_to = PastLeases(), 0

    def _write(self, record: Record) -> None:
        match record:
            case FinishedGroup():
                tasks = {stored.group.task_id for stored in self._groups.values()}
                if record.lease_id in self._groups or record.task_id in tasks:
                    raise JournalBrokeError(f"lease {record.lease_id} or task {record.task_id} is there already")
                self._groups[record.lease_id] = StoredGroup(record)
            case BatchRecord():
                for lease_id in record.lease_ids:
                    self._groups[lease_id].batch_version = record.version
            case ParkedRecord():
                self._parked[record.task_id] = record.reason
            case FilteredRecord():
                if record.task_id in self._filtered:
                    raise JournalBrokeError(f"task {record.task_id} was filtered already")
                self._filtered[record.task_id] = record.version
            case ForgetRecord():
                self._groups = {
                    lease_id: stored
                    for lease_id, stored in self._groups.items()
                    if stored.batch_version is None or stored.batch_version >= record.version
                }
                first = first_remembered(record.version)
                self._filtered = {task: version for task, version in self._filtered.items() if version >= first}
                self._forgotten_up_to = record.version


class AtOnce:
    """Stands where the journal's thread does: the clock says how long the disk takes."""

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)


def result_of(coroutine: Coroutine[Any, Any, T]) -> T:
    """Of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError(f"{coroutine} waits, and in virtual time nothing may")
