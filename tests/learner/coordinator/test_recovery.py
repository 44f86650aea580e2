"""Recovery of the coordinator: what a restart goes on from, whatever died, and when."""

import pytest

from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import DeliverBatch, ForgetTrained
from learner.coordinator.ledger import FrontierError, FrontierState, OpenTask, PastLeases
from learner.coordinator.recovery import JournalContents, recover
from learner.coordinator.replay_queue import JournaledGroup
from tests.builders_coordinator import a_coordinator, grants, group_for, join, of_kind, publishes, some_settings

SETTINGS = some_settings(groups_per_step=2, max_staleness=2)


def journaled(lease_id, task_id=None, *, batch=None, version=0):
    return JournaledGroup(
        lease_id=lease_id,
        task_id=lease_id if task_id is None else task_id,
        oldest_version=version,
        newest_version=version,
        accepted_version=version,
        batch_version=batch,
    )


def a_frontier(version=0, next_task_id=0, open_tasks=(), **values):
    return FrontierState(
        version=version, source="", next_task_id=next_task_id,
        open_tasks=tuple(OpenTask(task_id) for task_id in open_tasks),
        parked=values.pop("parked", {}), past=PastLeases(**values),
    )  # fmt: skip


def to_lease_again(recovered):
    return [task.task_id for task in recovered.tasks.open_tasks]


def test_without_a_journal_everything_that_was_open_is_leased_again():
    recovered = recover(a_frontier(2, 9, [4, 6, 7], leased=9, trained=6), JournalContents(), version=2)
    assert to_lease_again(recovered) == [4, 6, 7]
    assert recovered.past == PastLeases(leased=9, trained=6, cancelled={"restart": 3})


def test_accepted_groups_are_queued_and_what_lies_between_them_is_leased_again():
    journal = JournalContents(groups=[journaled(4), journaled(7), journaled(9)], past=PastLeases(leased=11, trained=2))
    recovered = recover(a_frontier(1, 6, [2, 3, 4, 5], leased=6, trained=2), journal, version=1)
    assert [group.task_id for group in recovered.queued] == [4, 7, 9]
    assert to_lease_again(recovered) == [2, 3, 5, 6, 8]
    assert recovered.tasks.next_task_id == 10
    assert (recovered.next_lease_id, recovered.past.cancelled) == (11, {"restart": 6})


def test_batches_that_were_delivered_are_delivered_again_as_they_were():
    groups = [journaled(0, batch=1), journaled(1, 9, batch=1), journaled(2, batch=2), journaled(3)]
    recovered = recover(a_frontier(1, 4), JournalContents(groups=groups), version=1)
    assert {version: [g.task_id for g in batch] for version, batch in recovered.batches.items()} == {1: [0, 9], 2: [2]}
    assert [group.task_id for group in recovered.queued] == [3]


def test_a_learner_that_lives_on_has_trained_what_was_delivered_before_its_version():
    groups = [journaled(0, batch=1), journaled(1, batch=1), journaled(2, batch=2), journaled(3, batch=2)]
    recovered = recover(a_frontier(1, 2, [0, 1], leased=4, trained=2), JournalContents(groups=groups), version=2)
    assert list(recovered.batches) == [2]
    assert recovered.past.trained == 4
    assert to_lease_again(recovered) == []


def test_steps_of_which_the_journal_knows_nothing_are_an_error():
    with pytest.raises(FrontierError, match="has trained version 1, but the journal does not know the batch"):
        recover(a_frontier(1, 4), JournalContents(groups=[journaled(0, batch=0)]), version=2)


def test_a_task_that_was_parked_since_stays_parked():
    journal = JournalContents(parked={3: "boom"})
    recovered = recover(a_frontier(0, 6, [2, 3], parked={1: "bang"}), journal, version=0)
    assert recovered.tasks.parked == {1: "bang", 3: "boom"}
    assert to_lease_again(recovered) == [2]


def journal_of(coordinator, *batches):
    """What the journal of this coordinator holds; batches: groups delivered, by version from 0 on."""
    groups = [
        journaled(group.lease_id, group.task_id, batch=version, version=group.oldest_version)
        for version, batch in enumerate(batches)
        for group in batch
    ]
    delivered = {group.lease_id for group in groups}
    groups += [
        journaled(group.lease_id, group.task_id, version=group.oldest_version)
        for group in coordinator.book.queue.oldest(1000)
        if group.lease_id not in delivered
    ]
    return JournalContents(groups=sorted(groups, key=lambda group: group.lease_id), past=coordinator.book.past())


def a_run_at_version_one():
    """A step of leases 0 and 1 is done, 2 and 3 are queued, 4 and 5 running; (coordinator, frontier at 0, batches)."""
    coordinator = a_coordinator(groups_per_step=2, max_staleness=2)
    frontier = coordinator.frontier()
    granted = join(coordinator)
    for grant in granted[:4]:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    [batch] = of_kind(coordinator.take_batch(0, now=1.0), DeliverBatch)
    coordinator.step_completed(1, (0, 1), now=1.0)
    publishes(coordinator, 1)
    return coordinator, frontier, batch.groups


def test_a_learner_killed_after_a_step_takes_the_same_step_again_and_then_goes_on_in_order():
    before, frontier, batch = a_run_at_version_one()
    after = Coordinator(SETTINGS, version=0, frontier=frontier, journal=journal_of(before, batch))
    assert (after.counts().queued, after.counts().trained) == (4, 0)
    after.published(0, now=0.0)
    leased_again = join(after)
    assert [grant.task_id for grant in leased_again] == [4, 5]
    [again] = of_kind(after.take_batch(0, now=0.0), DeliverBatch)
    assert [group.lease_id for group in again.groups] == [0, 1]
    after.step_completed(1, (0, 1), now=0.0)
    [second] = of_kind(after.take_batch(1, now=0.0), DeliverBatch)
    assert [group.lease_id for group in second.groups] == [2, 3]
    assert after.counts().balanced


def test_a_coordinator_killed_alone_goes_on_at_the_learners_version():
    before, frontier, batch = a_run_at_version_one()
    after = Coordinator(SETTINGS, version=1, frontier=frontier, journal=journal_of(before, batch))
    assert (after.counts().queued, after.counts().trained) == (2, 2)
    assert after.counts().leased == before.counts().leased
    assert after.counts().cancelled == {"restart": 4}


def test_a_step_whose_batch_was_delivered_by_the_coordinator_before_can_be_completed():
    before, frontier, batch = a_run_at_version_one()
    [second] = of_kind(before.take_batch(1, now=2.0), DeliverBatch)
    journal = journal_of(before, batch, second.groups)
    after = Coordinator(
        some_settings(groups_per_step=2, max_staleness=2), version=1, frontier=frontier, journal=journal
    )
    after.step_completed(2, (2, 3), now=0.0)
    assert (after.version, after.counts().trained, after.counts().queued) == (2, 4, 0)


def test_lease_ids_are_not_used_twice_and_pacing_counts_what_was_recovered():
    before, frontier, batch = a_run_at_version_one()
    journal = journal_of(before, batch)
    after = Coordinator(
        some_settings(groups_per_step=2, max_staleness=2), version=0, frontier=frontier, journal=journal
    )
    after.published(0, now=0.0)
    granted = join(after)
    assert [grant.lease_id for grant in granted] == [8, 9]  # eight were granted before; six may be open at a time
    assert grants(after.tick(now=1.0)) == []


def test_a_checkpoint_lets_the_journal_forget():
    before, _, _ = a_run_at_version_one()
    assert before.checkpointed(1) == [ForgetTrained(version=1)]
