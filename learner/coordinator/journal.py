"""Journal: accepted groups on disk, until a checkpoint covers them. What was acknowledged survives any crash.

One SQLite file in WAL mode with synchronous FULL: a transaction that was committed is on the disk. It knows everything
but the groups' bytes, which lie in files beside it, and there before the transaction that names them. Blocking; used
from one thread.

Few statements: at each, SQLite's module gives the interpreter away, and has to wait until the event loop's thread gives
it back.
"""

import errno
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeVar

import msgspec

from common.lifecycle import UserError
from common.messages import GroupHeader
from learner.coordinator.dynamic_sampling import first_remembered
from learner.coordinator.group_files import DamagedGroupError, GroupFiles, Place
from learner.coordinator.ledger import PastLeases
from learner.coordinator.recovery import JournalContents
from learner.coordinator.replay_queue import FinishedGroup, JournaledGroup

T = TypeVar("T")

FORMAT = "4"
BUSY_TIMEOUT_S = 5.0
MAX_LEASES = 500  # of one SQL statement
MAX_ROWS = 64  # likewise
_DISK_FULL = "the disk is full; make room and start the learner again"
_NO_ACCESS = "it cannot be opened; may this user write there?"
_GO_ON = "move it away to go on from the checkpoint alone: its groups are sampled again"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    lease_id INTEGER PRIMARY KEY,
    task_id INTEGER NOT NULL UNIQUE,
    oldest_version INTEGER NOT NULL,
    newest_version INTEGER NOT NULL,
    accepted_version INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    batch_version INTEGER,
    file INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    header_bytes INTEGER NOT NULL,
    payload_bytes INTEGER NOT NULL,
    digest BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS parked (task_id INTEGER PRIMARY KEY, reason TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS filtered (task_id INTEGER PRIMARY KEY, version INTEGER NOT NULL) STRICT;
"""
_GROUP_VALUES = "(?, ?, ?, ?, ?, ?, NULL, ?, ?, ?, ?, ?)"
_PRAGMAS = ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = FULL")


class JournalError(UserError):
    """The journal cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """The batch that was delivered for `version`."""

    version: int
    lease_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkedRecord:
    """The task is not leased again."""

    task_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FilteredRecord:
    """The task's group teaches nothing: it was left out of the step that updates `version`."""

    task_id: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetRecord:
    """Batches of versions before this one are covered by a checkpoint, and what was filtered before."""

    version: int


Record = FinishedGroup | BatchRecord | ParkedRecord | FilteredRecord | ForgetRecord


class Journal:
    """Opened for one run at a time; `lineage` names the learner's start that writes it.

    Raises JournalError when the file cannot be opened, is damaged, or another coordinator is writing it.
    """

    def __init__(self, path: Path, *, lineage: str) -> None:
        self._path = path
        with self._explained():
            self._database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
            for pragma in _PRAGMAS:
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
            self._check_format()
            self.lineage_before = self._fact("lineage", "")
            self._set_facts(lineage=lineage)
            self._files = GroupFiles(path.with_suffix(".groups"), needed=self._needed_files())

    def contents(self) -> JournalContents:
        """Everything but the groups' bytes."""
        rows = self._database.execute(
            "SELECT lease_id, task_id, oldest_version, newest_version, accepted_version, num_bytes, batch_version "
            "FROM groups ORDER BY lease_id"
        )
        groups = [
            JournaledGroup(
                lease_id=row[0], task_id=row[1], oldest_version=row[2], newest_version=row[3],
                accepted_version=row[4], num_bytes=row[5], batch_version=row[6],
            )
            for row in rows
        ]  # fmt: skip
        past = self._fact("past", "{}")
        return JournalContents(
            groups=groups,
            parked=dict(self._database.execute("SELECT task_id, reason FROM parked")),
            filtered=dict(self._database.execute("SELECT task_id, version FROM filtered")),
            past=msgspec.json.decode(past, type=PastLeases),
            forgotten_up_to=int(self._fact("forgotten_up_to", "0")),
        )

    def commit(self, records: Iterable[Record], past: PastLeases) -> None:
        """All or nothing, and on the disk when this returns. Raises JournalError."""
        records = list(records)
        with self._explained():
            places = self._write_contents([record for record in records if isinstance(record, FinishedGroup)])
            self._database.execute("BEGIN IMMEDIATE")
            try:
                self._write_all(records, places)
                self._set_facts(past=msgspec.json.encode(past).decode())
            except BaseException:  # whatever it is, nothing of it is written
                if self._database.in_transaction:  # SQLite has given up a transaction for which the disk had no room
                    self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")
            if any(isinstance(record, ForgetRecord) for record in records):
                self._files.reuse_all_but(self._needed_files())

    def read(self, lease_ids: Sequence[int]) -> dict[int, tuple[GroupHeader, bytes]]:
        """Header and payload by lease. Raises JournalError when one is missing or damaged."""
        found: dict[int, tuple[GroupHeader, bytes]] = {}
        with self._explained():
            for some in _at_most(MAX_LEASES, lease_ids):
                rows = self._database.execute(
                    "SELECT lease_id, file, offset, header_bytes, payload_bytes, digest FROM groups "
                    f"WHERE lease_id IN ({_marks(some)})",
                    some,
                )
                for lease_id, *place in rows:
                    found[lease_id] = self._contents_of(lease_id, Place(*place))
        missing = [lease_id for lease_id in lease_ids if lease_id not in found]
        if missing:
            raise JournalError(f"{self._path} has lost the groups of leases {missing}")
        return found

    def clear(self) -> None:
        """Forget everything: what is in here belongs to a life of the run that is not continued."""
        deletions = "; ".join(f"DELETE FROM {table}" for table in ("groups", "parked", "filtered"))
        self._database.executescript(f"BEGIN IMMEDIATE; {deletions}; COMMIT")
        self._set_facts(past="{}", forgotten_up_to="0")
        self._files.reuse_all_but(())

    def close(self) -> None:
        self._files.close()
        self._database.close()

    def _needed_files(self) -> set[int]:
        return {number for (number,) in self._database.execute("SELECT DISTINCT file FROM groups")}

    def _write_contents(self, groups: Sequence[FinishedGroup]) -> dict[int, Place]:
        """By lease."""
        contents = [(msgspec.msgpack.encode(group.header), group.payload) for group in groups]
        places = self._files.append(contents)
        return {group.lease_id: place for group, place in zip(groups, places, strict=True)}

    def _contents_of(self, lease_id: int, place: Place) -> tuple[GroupHeader, bytes]:
        try:
            header, payload = self._files.read(place)
        except DamagedGroupError as error:
            raise JournalError(f"the group of lease {lease_id} is damaged: {error}; {_GO_ON}") from error
        return msgspec.msgpack.decode(header, type=GroupHeader), payload

    def _write_all(self, records: Iterable[Record], places: dict[int, Place]) -> None:
        """In their order; groups that follow each other with one statement."""
        groups: list[FinishedGroup] = []
        for record in records:
            if isinstance(record, FinishedGroup):
                groups.append(record)
            else:
                self._write_groups(groups, places)
                groups = []
                self._write(record)
        self._write_groups(groups, places)

    def _write_groups(self, groups: Iterable[FinishedGroup], places: dict[int, Place]) -> None:
        rows = [
            (
                group.lease_id, group.task_id, group.oldest_version, group.newest_version, group.accepted_version,
                group.num_bytes, *places[group.lease_id],
            )
            for group in groups
        ]  # fmt: skip
        for some in _in_powers_of_two(rows):
            values = ", ".join([_GROUP_VALUES] * len(some))
            self._database.execute(f"INSERT INTO groups VALUES {values}", [*chain.from_iterable(some)])

    def _write(self, record: BatchRecord | ParkedRecord | FilteredRecord | ForgetRecord) -> None:
        match record:
            case BatchRecord():
                for some in _at_most(MAX_LEASES, record.lease_ids):
                    change = f"UPDATE groups SET batch_version = ? WHERE lease_id IN ({_marks(some)})"
                    self._database.execute(change, (record.version, *some))
            case ParkedRecord():
                self._database.execute("INSERT OR REPLACE INTO parked VALUES (?, ?)", (record.task_id, record.reason))
            case FilteredRecord():
                self._database.execute("INSERT INTO filtered VALUES (?, ?)", (record.task_id, record.version))
            case ForgetRecord():
                self._database.execute("DELETE FROM groups WHERE batch_version < ?", (record.version,))
                first = first_remembered(record.version)
                self._database.execute("DELETE FROM filtered WHERE version < ?", (first,))
                self._set_facts(forgotten_up_to=str(record.version))

    def _check_format(self) -> None:
        known = self._fact("format", FORMAT)
        if known != FORMAT:
            raise JournalError(
                f"{self._path} has format {known}, this version reads {FORMAT}; finish the run with that"
            )
        self._set_facts(format=FORMAT)

    def _fact(self, name: str, default: str) -> str:
        row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if row is None else str(row[0])

    def _set_facts(self, **facts: str) -> None:
        self._database.executemany("INSERT OR REPLACE INTO facts VALUES (?, ?)", list(facts.items()))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Whatever the database and the disk do not do is a JournalError."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise JournalError(self._explain(error)) from error

    def _explain(self, error: sqlite3.Error | OSError) -> str:
        if isinstance(error, OSError):
            name = errno.errorcode.get(error.errno or 0, "")
        else:
            name = getattr(error, "sqlite_errorname", "")
        advice = {
            "SQLITE_BUSY": "another coordinator is writing it; stop that one",
            "SQLITE_FULL": _DISK_FULL,
            "ENOSPC": _DISK_FULL,
            "EDQUOT": _DISK_FULL,
            "SQLITE_CORRUPT": f"the file is damaged; {_GO_ON}",
            "SQLITE_NOTADB": f"the file is damaged; {_GO_ON}",
            "SQLITE_CANTOPEN": _NO_ACCESS,
            "EACCES": _NO_ACCESS,
        }.get(name, "start the learner again when that is mended")
        return f"the journal {self._path} cannot be used: {error}; {advice}"


def _at_most(count: int, lease_ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (lease_ids[start : start + count] for start in range(0, len(lease_ids), count))


def _in_powers_of_two(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """So that there are few different statements, which SQLite's module keeps."""
    start = 0
    while start < len(rows):
        count = min(MAX_ROWS, 1 << (len(rows) - start).bit_length() - 1)
        yield rows[start : start + count]
        start += count


def _marks(values: Sequence[int]) -> str:
    return ", ".join("?" * len(values))
