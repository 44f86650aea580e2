"""Which journals are gone on from, and which belong to a life of the run that is not continued."""

import pytest

from learner.coordinator.journal import BatchRecord, ForgetRecord
from learner.coordinator.journal_keeper import open_journal
from learner.coordinator.ledger import FrontierState, PastLeases
from tests.builders_coordinator import a_group


def a_frontier(version):
    return FrontierState(
        version=version, source="", next_task_id=0, open_tasks=(), parked={}, past=PastLeases(leased=0)
    )  # fmt: skip


async def leases_gone_on_from(path, lineage, *, frontier_version=0, is_new_run=False):
    async with open_journal(path, lineage=lineage) as journal:
        contents = await journal.contents(a_frontier(frontier_version), is_new_run=is_new_run)
        return [group.lease_id for group in contents.groups]


@pytest.fixture
async def path(tmp_path):
    """Four groups; two of them were trained at version 0."""
    path = tmp_path / "journal.sqlite"
    async with open_journal(path, lineage="run.1") as journal:
        groups = [a_group(lease_id) for lease_id in range(4)]
        await journal.keep([*groups, BatchRecord(version=0, lease_ids=(0, 1))], PastLeases())
    return path


async def test_a_resumed_run_goes_on_from_the_journal(path):
    assert await leases_gone_on_from(path, "run.2") == [0, 1, 2, 3]


async def test_a_coordinator_that_replaces_one_of_the_same_learner_goes_on_even_before_the_first_checkpoint(path):
    assert await leases_gone_on_from(path, "run.1", is_new_run=True) == [0, 1, 2, 3]


async def test_a_run_without_a_checkpoint_begins_anew_whatever_another_life_left(path):
    assert await leases_gone_on_from(path, "run.2", is_new_run=True) == []
    assert await leases_gone_on_from(path, "run.2") == []  # nothing of it comes back later


async def test_a_checkpoint_older_than_what_the_journal_still_knows_stands_alone(path, caplog):
    async with open_journal(path, lineage="run.1") as journal:
        await journal.keep([ForgetRecord(version=1)], PastLeases())
    assert await leases_gone_on_from(path, "run.2", frontier_version=0) == []
    assert "2 groups in the journal are of a later checkpoint than the one to go on from" in caplog.text


async def test_the_checkpoint_that_the_journal_is_forgotten_up_to_is_gone_on_from(path):
    async with open_journal(path, lineage="run.1") as journal:
        await journal.keep([ForgetRecord(version=1)], PastLeases())
    assert await leases_gone_on_from(path, "run.2", frontier_version=1) == [2, 3]
