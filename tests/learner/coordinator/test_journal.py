import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from learner.coordinator.group_files import FILE_BYTES
from learner.coordinator.journal import (
    BatchRecord,
    FilteredRecord,
    ForgetRecord,
    Journal,
    JournalError,
    ParkedRecord,
)
from learner.coordinator.ledger import PastLeases
from tests.builders_coordinator import a_group

PAST = PastLeases(leased=7, trained=2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


@pytest.fixture
def journal(path):
    journal = Journal(path, lineage="run.1")
    yield journal
    journal.close()


def reopened(path, journal, lineage="run.2"):
    journal.close()
    return Journal(path, lineage=lineage)


def index_of(journal):
    return [(group.lease_id, group.task_id, group.batch_version) for group in journal.contents().groups]


def test_what_was_committed_is_there_after_a_restart_byte_for_byte(path, journal):
    group = a_group(3, 5, oldest=1, newest=2, payload_bytes=1000)
    journal.commit([group, ParkedRecord(task_id=9, reason="boom")], PAST)
    again = reopened(path, journal)
    contents = again.contents()
    [kept] = contents.groups
    assert (kept.lease_id, kept.task_id, kept.oldest_version, kept.newest_version, kept.accepted_version) == (
        3, 5, 1, 2, 2,
    )  # fmt: skip
    assert kept.num_bytes == group.num_bytes
    assert (contents.parked, contents.past, contents.forgotten_up_to) == ({9: "boom"}, PAST, 0)
    assert again.read([3]) == {3: (group.header, group.payload)}
    assert again.lineage_before == "run.1"
    again.close()


def test_a_commit_waits_until_the_disk_has_it(journal):
    """SQLite's own promise for these two: a committed transaction survives a loss of power."""
    settings = [journal._database.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]
    assert settings == ["wal", 2]


def test_a_batch_is_remembered_and_forgotten_once_a_checkpoint_covers_it(journal):
    journal.commit([a_group(lease_id) for lease_id in range(4)], PAST)
    journal.commit([BatchRecord(version=0, lease_ids=(0, 2)), BatchRecord(version=1, lease_ids=(3,))], PAST)
    assert index_of(journal) == [(0, 0, 0), (1, 1, None), (2, 2, 0), (3, 3, 1)]
    journal.commit([ForgetRecord(version=1)], PAST)
    assert index_of(journal) == [(1, 1, None), (3, 3, 1)]
    assert journal.contents().forgotten_up_to == 1


def test_what_was_filtered_is_remembered_until_no_checkpoint_needs_to_be_told(journal):
    """A checkpoint of version 3 does not say what was filtered for the step before it: see dynamic_sampling.py."""
    journal.commit([FilteredRecord(task_id=10 + version, version=version) for version in range(4)], PAST)
    assert journal.contents().filtered == {10: 0, 11: 1, 12: 2, 13: 3}
    journal.commit([ForgetRecord(version=3)], PAST)
    assert journal.contents().filtered == {12: 2, 13: 3}
    journal.clear()
    assert journal.contents().filtered == {}


def test_a_commit_is_all_or_nothing(journal):
    journal.commit([a_group(0)], PAST)
    with pytest.raises(JournalError, match="UNIQUE constraint failed"):
        journal.commit([a_group(1), a_group(0)], PastLeases(leased=99))
    assert index_of(journal) == [(0, 0, None)]
    assert journal.contents().past == PAST
    journal.commit([a_group(1)], PAST)


def test_a_task_is_accepted_once_whatever_its_lease(journal):
    journal.commit([a_group(0, task_id=7)], PAST)
    with pytest.raises(JournalError, match=r"groups\.task_id"):
        journal.commit([a_group(1, task_id=7)], PAST)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda file: file.write_bytes(b"\x00" + file.read_bytes()[1:]), "is damaged at 0"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x01"), "is damaged at 0"),
        (lambda file: os.truncate(file, 50), "is damaged at 0"),
        (lambda file: file.unlink(), "is missing"),
    ],
    ids=["header", "payload", "torn", "gone"],
)
def test_a_group_that_was_damaged_on_the_disk_is_never_handed_out(path, journal, damage, why):
    journal.commit([a_group(0, payload_bytes=100)], PAST)
    damage(path.with_suffix(".groups") / "00000001")
    again = reopened(path, journal)
    with pytest.raises(JournalError, match=rf"the group of lease 0 is damaged: .* {why}; move it away to go on"):
        again.read([0])
    again.close()


def test_a_group_that_cannot_be_read_is_an_error_that_names_the_journal(path, journal):
    journal.commit([a_group(0)], PAST)
    file = path.with_suffix(".groups") / "00000001"
    file.unlink()
    file.mkdir()
    with pytest.raises(JournalError, match=r"the journal .*sqlite cannot be used: .*Is a directory"):
        journal.read([0])


def test_a_group_that_is_missing_is_named(journal):
    with pytest.raises(JournalError, match=r"has lost the groups of leases \[1, 2\]"):
        journal.read([1, 2])


def test_many_groups_are_read_at_once(journal):
    journal.commit([a_group(lease_id) for lease_id in range(1200)], PAST)
    assert journal.read(range(1200)).keys() == set(range(1200))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 1201])
def test_any_number_of_groups_is_written_and_delivered_at_once(journal, count):
    groups = [a_group(lease_id) for lease_id in range(count)]
    journal.commit([*groups, BatchRecord(version=3, lease_ids=tuple(range(count)))], PAST)
    assert index_of(journal) == [(lease_id, lease_id, 3) for lease_id in range(count)]


def test_a_commit_of_many_groups_is_few_statements(journal):
    """The interpreter is given away at each, and the event loop's thread may keep it for a while."""
    statements = []
    journal._database.set_trace_callback(statements.append)
    groups = [a_group(lease_id) for lease_id in range(100)]
    journal.commit([*groups, BatchRecord(version=0, lease_ids=tuple(range(100)))], PAST)
    assert len(statements) < 10


def test_clearing_forgets_everything_but_who_wrote_it(path, journal):
    journal.commit([a_group(0), ParkedRecord(task_id=1, reason="x"), ForgetRecord(version=0)], PAST)
    journal.clear()
    contents = journal.contents()
    assert (list(contents.groups), contents.parked, contents.past) == ([], {}, PastLeases())
    assert reopened(path, journal).lineage_before == "run.1"


def test_two_coordinators_cannot_write_one_journal(path, journal, monkeypatch):
    monkeypatch.setattr("learner.coordinator.journal.BUSY_TIMEOUT_S", 0.05)
    with pytest.raises(JournalError, match="another coordinator is writing it; stop that one"):
        Journal(path, lineage="run.2")


@pytest.mark.parametrize("damage", [b"garbage" * 1000, b"SQLite format 3\x00" + bytes(4000)])
def test_a_damaged_file_is_an_error_that_says_what_to_do(path, damage):
    path.write_bytes(damage)
    with pytest.raises(JournalError, match="the file is damaged; move it away to go on from the checkpoint alone"):
        Journal(path, lineage="run.1")


def test_a_journal_of_another_format_is_refused(path, journal):
    journal._set_facts(format="99")
    with pytest.raises(JournalError, match="has format 99, this version reads 4"):
        reopened(path, journal)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(JournalError, match="it cannot be opened; may this user write there"):
        Journal(tmp_path / "nowhere" / "journal.sqlite", lineage="run.1")


def test_a_full_disk_is_an_error_and_nothing_is_half_written(path, journal):
    journal.commit([a_group(0)], PAST)
    pages = journal._database.execute("PRAGMA page_count").fetchone()[0]
    journal._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalError, match="the disk is full; make room and start the learner again"):
        journal.commit([a_group(lease_id) for lease_id in range(1, 1000)], PAST)
    again = reopened(path, journal)
    assert index_of(again) == [(0, 0, None)]
    again.close()


def test_a_group_for_whose_bytes_there_is_no_room_is_not_half_written(path, journal, monkeypatch):
    def no_room(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", no_room)
        with pytest.raises(JournalError, match="the disk is full; make room and start the learner again"):
            journal.commit([a_group(0)], PAST)
    assert index_of(journal) == []
    journal.commit([a_group(0)], PAST)
    assert journal.read([0]).keys() == {0}


def test_a_group_is_on_the_disk_before_anything_names_it(journal, monkeypatch):
    done = []
    sync = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (sync(descriptor), done.append("bytes")))
    journal._database.set_trace_callback(done.append)
    journal.commit([a_group(0)], PAST)
    assert done.index("bytes") < done.index("COMMIT")


WRITER = """
import sys
from dataclasses import replace
from pathlib import Path
from learner.coordinator.journal import Journal
from learner.coordinator.ledger import PastLeases
from tests.builders_coordinator import a_group

journal = Journal(Path(sys.argv[1]), lineage="run.1")
for lease_id in range(100_000):
    journal.commit([a_group(lease_id, payload_bytes=5000)], PastLeases())
    print(lease_id, flush=True)
"""


def test_what_a_killed_writer_said_it_committed_is_there(path):
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    committed = [int(writer.stdout.readline()) for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    committed += [int(line) for line in writer.stdout.read().split()]
    writer.wait(timeout=10)
    writer.stdout.close()
    journal = Journal(path, lineage="run.2")
    there = [group.lease_id for group in journal.contents().groups]
    assert there[: len(committed)] == committed
    assert len(there) <= len(committed) + 1
    assert len(journal.read(there)) == len(there)
    journal.close()


def written(path):
    """Bytes of all that the journal consists of."""
    files = (path, path.with_name(f"{path.name}-wal"), *path.with_suffix(".groups").iterdir())
    return sum(file.stat().st_size for file in files)


def test_the_bytes_of_a_group_are_written_once_not_again_when_it_is_delivered_or_forgotten(path, journal):
    size = 4 << 20
    before = written(path)
    journal.commit([a_group(0, payload_bytes=size)], PAST)
    journal.commit([BatchRecord(version=0, lease_ids=(0,))], PAST)
    journal.commit([ForgetRecord(version=1)], PAST)
    assert size < written(path) - before < 1.1 * size
    with pytest.raises(JournalError, match=r"has lost the groups of leases \[0\]"):
        journal.read([0])


def test_the_room_of_what_was_forgotten_is_used_again_and_of_nothing_else(path, journal):
    waiting = a_group(1000, payload_bytes=FILE_BYTES)
    journal.commit([waiting], PAST)
    for version in range(20):
        journal.commit([a_group(version, payload_bytes=FILE_BYTES)], PAST)
        journal.commit([BatchRecord(version=version, lease_ids=(version,)), ForgetRecord(version=version)], PAST)
    assert written(path) < 6 * FILE_BYTES
    assert journal.read([1000]) == {1000: (waiting.header, waiting.payload)}


def test_the_room_of_what_is_forgotten_is_used_again_only_once_the_disk_knows(journal, monkeypatch):
    done = []
    reuse = journal._files.reuse_all_but
    journal._database.set_trace_callback(done.append)
    monkeypatch.setattr(journal._files, "reuse_all_but", lambda needed: (done.append("reused"), reuse(needed)))
    journal.commit([a_group(0), ForgetRecord(version=1)], PAST)
    assert done.index("COMMIT") < done.index("reused")


def test_what_the_journal_does_not_know_is_deleted_when_it_is_opened(path, journal):
    for lease_id in range(3):
        journal.commit([a_group(lease_id, payload_bytes=FILE_BYTES)], PAST)
    journal.commit([BatchRecord(version=0, lease_ids=(0,)), ForgetRecord(version=1)], PAST)
    directory = path.with_suffix(".groups")
    (directory / "note.txt").write_text("of somebody else")
    again = reopened(path, journal)
    assert sorted(file.name for file in directory.iterdir()) == ["00000002", "00000003", "note.txt"]
    again.commit([a_group(9)], PAST)
    assert again.read([1, 2, 9]).keys() == {1, 2, 9}
    again.close()


def test_clearing_keeps_no_room_for_what_it_forgets(path, journal):
    for lease_id in range(3):
        journal.commit([a_group(lease_id, payload_bytes=FILE_BYTES)], PAST)
    journal.clear()
    for lease_id in range(3):
        journal.commit([a_group(lease_id, payload_bytes=FILE_BYTES)], PAST)
    assert written(path) < 4 * FILE_BYTES + (1 << 20)


def test_a_group_is_written_from_wherever_its_bytes_lie(journal):
    group = a_group(0, payload_bytes=100)
    journal.commit([replace(group, payload=memoryview(bytes(100)).toreadonly())], PAST)
    assert journal.read([0]) == {0: (group.header, bytes(100))}
