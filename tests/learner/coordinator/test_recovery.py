"""Recovery of the coordinator: what a restart goes on from, whatever died, and when."""

import pytest

from learner.coordinator.batches import Batches
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import AcceptGroup, CancelLease, DeliverBatch, ForgetTrained
from learner.coordinator.leases import LEASE_ID_LEAP
from learner.coordinator.ledger import FrontierError, FrontierState, OpenTask, PastLeases
from learner.coordinator.records import Claim
from learner.coordinator.recovery import JournalContents, recover
from learner.coordinator.replay_queue import JournaledGroup
from tests.builders_coordinator import (
    a_coordinator,
    a_group,
    grants,
    group_for,
    join,
    of_kind,
    publishes,
    some_settings,
)

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
    assert (recovered.past.leased, recovered.past.cancelled) == (11, {"restart": 6})


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
    after = Coordinator(SETTINGS, frontier=frontier, journal=journal, servers_return_until=0.0)
    after.published(0, now=0.0)
    granted = join(after)
    assert [grant.lease_id - LEASE_ID_LEAP for grant in granted] == [8, 9]  # eight before; six may be open at a time
    assert grants(after.tick(now=1.0)) == []


def test_a_checkpoint_lets_the_journal_forget():
    before, _, _ = a_run_at_version_one()
    assert before.checkpointed(1) == [ForgetTrained(version=1)]


def claim_of(grant, **changes):
    values = {"lease_id": grant.lease_id, "task_id": grant.task_id, "min_version": grant.min_version}
    return Claim(**(values | changes))


def returns(coordinator, *claims, server_id="a", now=0.0):
    return coordinator.server_ready(server_id, capacity_groups=100, capacity_bytes=1 << 30, claims=claims, now=now)


def a_coordinator_replaced():
    """At version 0, K = 2, G = 2: of six leases, 0 and 1 are accepted. (The new coordinator, the six grants.)"""
    before = a_coordinator(groups_per_step=2, max_staleness=2)
    granted = join(before)
    for grant in granted[:2]:
        before.group_finished("a", group_for(grant), now=1.0)
    after = Coordinator(
        SETTINGS, frontier=before.frontier(), journal=journal_of(before), servers_return_until=10.0
    )  # fmt: skip
    after.published(0, now=0.0)
    return after, granted


def test_a_server_goes_on_with_the_leases_of_a_coordinator_that_was_replaced():
    after, granted = a_coordinator_replaced()
    assert returns(after, *map(claim_of, granted[2:])) == []
    after.heartbeat("a", progress=1, loaded_version=0, now=1.0)
    assert of_kind(after.group_finished("a", group_for(granted[3]), now=1.0), AcceptGroup)
    assert grants(after.tick(now=10.0)) == []  # six are open: every one of them is known
    assert after.counts().balanced
    assert after.counts().running == 3


def test_until_servers_have_had_time_to_return_nothing_is_granted():
    after, _ = a_coordinator_replaced()
    assert grants(returns(after)) == []
    after.heartbeat("a", progress=1, loaded_version=0, now=9.0)
    assert grants(after.tick(now=9.9)) == []
    assert [grant.task_id for grant in grants(after.tick(now=10.0))] == [2, 3, 4, 5]


@pytest.mark.parametrize(
    "changes",
    [
        {"task_id": 0},  # its group was accepted
        {"lease_id": 0},  # likewise
        {"task_id": 500},  # nobody could have been granted it
        {"min_version": 1},  # nothing of that version exists
    ],
)
def test_a_lease_whose_task_is_not_free_is_not_gone_on_with(changes):
    after, granted = a_coordinator_replaced()
    [cancelled] = returns(after, claim_of(granted[2], **changes))
    assert isinstance(cancelled, CancelLease)
    assert cancelled.reason == "it was given up meanwhile"
    assert after.counts().running == 0


def test_two_servers_cannot_go_on_with_one_task():
    after, granted = a_coordinator_replaced()
    returns(after, claim_of(granted[2]), server_id="a")
    [cancelled] = of_kind(returns(after, claim_of(granted[2], lease_id=77), server_id="b"), CancelLease)
    assert (cancelled.server_id, cancelled.lease_id) == ("b", 77)


def test_a_lease_that_was_granted_after_the_last_word_in_the_journal_is_gone_on_with():
    after, _ = a_coordinator_replaced()
    assert returns(after, Claim(lease_id=9, task_id=8, min_version=0)) == []
    assert sorted(after.book.tasks.given_back()) == [2, 3, 4, 5, 6, 7]


def test_a_lease_that_could_not_be_trained_in_time_any_more_is_not_gone_on_with():
    settings = some_settings(groups_per_step=2, max_staleness=0)
    after = Coordinator(settings, version=3, frontier=a_coordinator_at(3, settings).frontier())
    assert of_kind(returns(after, Claim(lease_id=1, task_id=6, min_version=2)), CancelLease)


def a_coordinator_at(version, settings):
    coordinator = Coordinator(settings)
    coordinator.published(0, now=0.0)
    join(coordinator)
    for step in range(version):
        for lease in list(coordinator.book.running.values()):
            coordinator.group_finished("a", group_for(lease, sampled_at=step), now=0.0)
        [batch] = of_kind(coordinator.take_batch(step, now=0.0), DeliverBatch)
        coordinator.step_completed(step + 1, tuple(group.lease_id for group in batch.groups), now=0.0)
        publishes(coordinator, step + 1)
    return coordinator


def test_a_server_that_was_given_up_and_returns_goes_on_with_what_nobody_else_took():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0)
    granted = join(coordinator)
    coordinator.server_lost("a", "silent", now=1.0)
    assert grants(returns(coordinator, *map(claim_of, granted), now=2.0)) == []
    coordinator.heartbeat("a", progress=1, loaded_version=0, now=2.0)
    refused_before = coordinator.counts().refused
    assert of_kind(coordinator.group_finished("a", group_for(granted[0]), now=3.0), AcceptGroup)
    assert coordinator.counts().refused == refused_before
    assert coordinator.counts().balanced


def test_a_lease_is_not_gone_on_with_when_it_should_have_been_in_the_batch_that_the_learner_has():
    batches = Batches(SETTINGS, recover(a_frontier(), JournalContents(), version=0))
    for lease_id in (0, 1):
        batches.put(a_group(lease_id, oldest=1))
    batches.deliver(1, batches.next(1))
    assert not batches.would_fit(1, version=1)
    assert batches.would_fit(2, version=1)
    batches.consume(1, (0, 1))
    assert batches.would_fit(2, version=2)


def test_a_lease_claimed_twice_is_gone_on_with_once():
    after, granted = a_coordinator_replaced()
    assert returns(after, claim_of(granted[2]), claim_of(granted[2])) == []
    assert after.counts().running == 1


def test_a_lease_whose_server_was_told_to_forget_the_group_is_not_gone_on_with():
    """Its Ready may have been on the way already."""
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0)
    [first, _] = join(coordinator)
    coordinator.server_lost("a", "silent", now=1.0)
    coordinator.refuse_group("a", first.lease_id, now=2.0)
    [cancelled, *_] = returns(coordinator, claim_of(first), now=3.0)
    assert isinstance(cancelled, CancelLease)


def test_lease_ids_go_on_from_the_highest_that_was_ever_written():
    journal = JournalContents(past=PastLeases(leased=5, next_lease_id=70))
    recovered = recover(a_frontier(1, 4, leased=9, next_lease_id=9), journal, version=1)
    assert recovered.next_lease_id == 70


def test_a_coordinator_that_replaces_another_knows_what_servers_may_have_loaded():
    after = Coordinator(SETTINGS, published_version=0, servers_return_until=0.0)
    [grant, *_] = join(after)
    assert of_kind(after.group_finished("a", group_for(grant), now=1.0), AcceptGroup)
