"""Dynamic sampling: groups of equal rewards are filtered, others take their place, and no crash does either twice."""

import pytest

from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import AcceptGroup, DeliverBatch, FilterGroup, RefuseGroup
from learner.coordinator.dynamic_sampling import has_equal_rewards
from learner.coordinator.explain import what_the_learner_waits_for
from learner.coordinator.ledger import FrontierState, PastLeases, decode_frontier, encode_frontier
from learner.coordinator.records import Claim
from learner.coordinator.recovery import JournalContents
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

EQUAL, UNEQUAL = (1.0, 1.0), (0.0, 1.0)
ON_POLICY = {"groups_per_step": 2, "max_staleness": 0, "max_filtered": 3}


@pytest.mark.parametrize(
    ("rewards", "is_equal"),
    [(EQUAL, True), (UNEQUAL, False), ((0.0, 0.0, 0.0, 1e-9), False), ((0.5,), True), ((-0.0, 0.0), True)],
)
def test_rewards_are_equal_when_no_two_differ(rewards, is_equal):
    assert has_equal_rewards(a_group(rewards=rewards).header) is is_equal


def finish(coordinator, grant, rewards, now=1.0):
    return coordinator.group_finished("a", group_for(grant, rewards=rewards), now)


def test_a_group_of_equal_rewards_is_acknowledged_but_not_queued_and_another_task_is_leased():
    coordinator = a_coordinator(**ON_POLICY)
    first, second = join(coordinator)
    decisions = finish(coordinator, first, EQUAL)
    assert of_kind(decisions, FilterGroup) == [FilterGroup(server_id="a", lease_id=0, task_id=0, version=0)]
    [refill] = grants(decisions)
    assert (refill.task_id, refill.min_version, len(coordinator.book.queue)) == (2, 0, 0)
    coordinator.take_batch(0, now=1.0)
    finish(coordinator, second, UNEQUAL)
    [batch] = of_kind(finish(coordinator, refill, UNEQUAL), DeliverBatch)
    assert [group.task_id for group in batch.groups] == [1, 2]
    counts = coordinator.counts()
    assert counts.cancelled == {"equal_rewards": 1}
    assert counts.balanced


def test_without_dynamic_sampling_every_group_is_taken():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0)
    assert of_kind(finish(coordinator, join(coordinator)[0], EQUAL), AcceptGroup)


def test_a_step_that_had_enough_filtered_takes_groups_as_they_come_and_the_next_one_filters_again():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0, max_filtered=1)
    join(coordinator)
    coordinator.take_batch(0, now=0.0)

    def finish_all():
        running = list(coordinator.book.running.values())
        decisions = [each for lease in running for each in finish(coordinator, lease, EQUAL)]
        return len(of_kind(decisions, FilterGroup)), of_kind(decisions, DeliverBatch)

    assert finish_all() == (1, [])
    num_filtered, [batch] = finish_all()
    assert num_filtered == 0
    coordinator.step_completed(1, tuple(group.lease_id for group in batch.groups), now=1.0)
    publishes(coordinator, 1, now=1.0)
    coordinator.take_batch(1, now=1.0)
    assert finish_all() == (1, [])


def test_a_filtered_group_that_comes_again_is_a_duplicate():
    coordinator = a_coordinator(**ON_POLICY)
    first, _ = join(coordinator)
    finish(coordinator, first, EQUAL)
    [refused] = of_kind(finish(coordinator, first, EQUAL), RefuseGroup)
    assert refused.kind == "duplicate"
    assert coordinator.counts().cancelled == {"equal_rewards": 1}


def test_the_learner_is_told_why_its_batch_is_not_there():
    coordinator = a_coordinator(**ON_POLICY)
    first, second = join(coordinator)
    finish(coordinator, first, EQUAL)
    finish(coordinator, second, EQUAL)
    waits_for = what_the_learner_waits_for(coordinator, 1.0, listen_address="tcp://x")
    assert waits_for.endswith("(2 of at most 3 groups filtered for equal rewards)")


# --- after a crash


def restarted(frontier=b"", *, version=0, **journal):
    coordinator = Coordinator(
        some_settings(**ON_POLICY), version=version, frontier=frontier, journal=JournalContents(**journal)
    )
    publishes(coordinator, version)
    return coordinator


def test_what_the_journal_knows_as_filtered_is_not_sampled_again_and_counts_for_its_step():
    coordinator = restarted(filtered={0: 0, 2: 0})
    assert [grant.task_id for grant in join(coordinator)] == [1, 3]
    assert of_kind(finish(coordinator, coordinator.book.running[0], EQUAL), FilterGroup)
    assert of_kind(finish(coordinator, coordinator.book.running[1], EQUAL), AcceptGroup)  # the fourth for this step


def test_a_server_does_not_go_on_with_a_lease_whose_group_was_filtered():
    coordinator = restarted(filtered={0: 0}, past=PastLeases(leased=1, next_lease_id=1))
    claims = [Claim(lease_id=0, task_id=0, min_version=0)]
    coordinator.server_ready("a", capacity_groups=4, capacity_bytes=1 << 30, claims=claims, now=0.0)
    assert 0 not in coordinator.book.running


def test_a_checkpoint_leaves_to_the_journal_what_was_filtered_lately_and_says_the_rest_itself():
    """What was filtered while a step was under way may not be in the journal when the checkpoint after it is taken."""
    coordinator = a_coordinator(**ON_POLICY)
    join(coordinator)

    def open_tasks():
        state = decode_frontier(coordinator.frontier(), version=coordinator.version, source="")
        return [task.task_id for task in state.open_tasks]

    def step(version):
        finish(coordinator, next(iter(coordinator.book.running.values())), EQUAL)
        coordinator.take_batch(version, now=1.0)
        leases = [finish(coordinator, lease, UNEQUAL) and lease for lease in list(coordinator.book.running.values())]
        coordinator.step_completed(version + 1, tuple(lease.lease_id for lease in leases), now=1.0)
        publishes(coordinator, version + 1)
        return sorted(lease.task_id for lease in leases)

    assert step(0) == [1, 2]
    assert open_tasks() == [0, 3, 4]  # 0 was filtered, 3 and 4 are leased
    assert step(1) == [4, 5]
    assert open_tasks() == [3, 6, 7]  # of 0 it says that it is done
    after = restarted(coordinator.frontier(), version=2)
    assert [grant.task_id for grant in join(after)] == [3, 6]  # the journal has lost 3, or never had it


def test_a_checkpoint_right_after_a_restart_says_itself_what_the_journal_will_forget_with_it():
    coordinator = restarted(a_frontier_at(2), version=2, filtered={0: 0, 3: 1})
    state = decode_frontier(coordinator.frontier(), version=2, source="")
    assert [task.task_id for task in state.open_tasks] == [3]


def a_frontier_at(version):
    state = FrontierState(version=version, source="", next_task_id=4, open_tasks=(), parked={}, past=PastLeases())
    return encode_frontier(state)
