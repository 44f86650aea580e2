import json

import pytest

from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import DeliverBatch
from learner.coordinator.ledger import FrontierError
from tests.builders_coordinator import a_coordinator, grants, group_for, join, of_kind, some_settings


def a_run_stopped_after_one_step():
    """Tasks 0 and 3 trained, 1 failed twice and open, 2 and 4 queued, 5 and 6 running; version 1."""
    coordinator = a_coordinator(max_staleness=2, groups_per_step=2)
    granted = {grant.task_id: grant for grant in join(coordinator)}
    for _ in range(2):
        [again] = grants(coordinator.lease_failed("a", granted[1].lease_id, "environment", "boom", now=1.0))
        granted[1] = again
        coordinator.group_finished("a", group_for(granted[2]), now=1.0)
    for task_id in (0, 3, 4):
        coordinator.group_finished("a", group_for(granted[task_id]), now=1.0)
    [batch] = of_kind(coordinator.take_batch(0, now=1.0), DeliverBatch)
    coordinator.step_completed(1, tuple(group.lease_id for group in batch.groups), now=2.0)
    return coordinator, {group.task_id for group in batch.groups}


def test_a_resumed_run_leases_exactly_what_was_not_trained_then_goes_on_with_new_tasks():
    stopped, trained = a_run_stopped_after_one_step()
    handed_out = stopped.book.tasks.next_task_id
    resumed = Coordinator(some_settings(max_staleness=20, groups_per_step=2), version=1, frontier=stopped.frontier())
    resumed.published(1, now=0.0)
    leased = [grant.task_id for grant in join(resumed)]
    still_open = sorted(set(range(handed_out)) - trained)
    assert leased[: len(still_open)] == still_open
    assert leased[len(still_open) :] == list(range(handed_out, handed_out + 42 - len(still_open)))


def test_the_failures_of_a_task_are_not_forgiven_by_a_resume():
    stopped, _ = a_run_stopped_after_one_step()
    resumed = Coordinator(some_settings(groups_per_step=2), version=1, frontier=stopped.frontier())
    [first, *_] = join(resumed)
    assert first.task_id == 1
    resumed.lease_failed("a", first.lease_id, "environment", "boom", now=1.0)
    assert resumed.book.tasks.parked == {1: "environment: boom"}
    again = Coordinator(some_settings(groups_per_step=2), version=1, frontier=resumed.frontier())
    assert again.book.tasks.parked == {1: "environment: boom"}
    assert 1 not in [grant.task_id for grant in join(again)]


def test_counts_go_on_over_a_resume_and_open_leases_count_as_cancelled():
    stopped, _ = a_run_stopped_after_one_step()
    before = stopped.counts()
    resumed = Coordinator(some_settings(groups_per_step=2), version=1, frontier=stopped.frontier())
    after = resumed.counts()
    assert (after.leased, after.trained, after.failed) == (before.leased, 2, before.failed)
    assert after.cancelled == {"restart": before.running + before.queued}
    assert after.balanced


def test_a_restored_lease_is_granted_for_the_version_of_the_checkpoint():
    stopped, _ = a_run_stopped_after_one_step()
    resumed = Coordinator(some_settings(groups_per_step=2, max_staleness=0), version=1, frontier=stopped.frontier())
    assert [grant.min_version for grant in join(resumed)] == [1, 1]


def test_a_frontier_of_another_version_or_another_data_source_is_refused():
    frontier = a_coordinator(source="a.jsonl seed 1").frontier()
    with pytest.raises(FrontierError, match="has trained version 0, but the journal does not know the batch"):
        Coordinator(some_settings(source="a.jsonl seed 1"), version=3, frontier=frontier)
    later, _ = a_run_stopped_after_one_step()
    with pytest.raises(FrontierError, match="taken at version 1, the learner is at 0"):
        Coordinator(some_settings(groups_per_step=2), version=0, frontier=later.frontier())
    with pytest.raises(FrontierError, match=r"trained on 'a.jsonl seed 1', the run is configured for 'b.jsonl seed 1'"):
        Coordinator(some_settings(source="b.jsonl seed 1"), version=0, frontier=frontier)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_task_id": 0, "open_tasks": [[3]]}, "a task is listed that was never handed out"),
        ({"next_task_id": 9, "open_tasks": [[3], [3]]}, "a task is listed twice"),
        ({"next_task_id": 9, "open_tasks": [[3]], "parked": {"3": "x"}}, "a task is listed twice"),
        ({"next_task_id": -1}, "damaged"),
        ({"format": 2}, "damaged"),
        ({"unknown": 2}, "damaged"),
    ],
)
def test_a_damaged_frontier_is_refused(change, message):
    frontier = json.loads(a_coordinator().frontier()) | change
    with pytest.raises(FrontierError, match=message):
        Coordinator(some_settings(), frontier=json.dumps(frontier).encode())


def test_a_frontier_that_is_no_json_is_refused():
    with pytest.raises(FrontierError, match="the checkpoint's frontier is damaged"):
        Coordinator(some_settings(), frontier=b"\xff{")
