import pytest

from learner.coordinator.explain import (
    what_a_server_waits_for,
    what_all_servers_wait_for,
    what_the_learner_waits_for,
)
from learner.coordinator.sessions import Sessions
from learner.coordinator.status import status_of
from learner.coordinator.token_ages import TokenAges
from learner.measurements import measure_run
from tests.builders_coordinator import MAX_GROUP_BYTES, a_coordinator, group_for, join


def learner_waits_for(coordinator, now=0.0):
    return what_the_learner_waits_for(coordinator, now, listen_address="tcp://127.0.0.1:5555")


def test_without_servers_the_learner_waits_for_one_to_join_at_the_address():
    assert learner_waits_for(a_coordinator()) == "no rollout server has joined at tcp://127.0.0.1:5555"


def test_the_learner_waits_for_the_oldest_lease_and_its_server_by_name():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=2)
    granted = join(coordinator, now=5.0)
    coordinator.heartbeat("a", progress=1, loaded_version=0, now=16.0)
    assert learner_waits_for(coordinator, now=17.0) == "server a: 3 groups running, lease 0 (task 0) since 12 s"
    assert learner_waits_for(coordinator, now=19.0).endswith("since 14 s; nothing heard of it for 3 s")
    coordinator.group_finished("a", group_for(granted[0]), now=18.0)
    assert learner_waits_for(coordinator, now=18.0) == ""


def test_a_server_that_lacks_the_snapshot_it_needs_is_named():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    join(coordinator)
    coordinator.heartbeat("a", progress=1, loaded_version=-1, now=0.0)
    assert learner_waits_for(coordinator, now=2.0) == (
        "server a: 1 groups running, lease 0 (task 0) since 2 s, which needs snapshot 0; the learner's "
        "snapshot server has published it, the server has none"
    )


def test_a_snapshot_that_is_not_published_is_the_learners_own_matter():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    join(coordinator)
    coordinator.book.published_version = -1
    coordinator.heartbeat("a", progress=1, loaded_version=-1, now=0.0)
    assert learner_waits_for(coordinator, now=2.0).endswith(
        "which needs snapshot 0; the learner's snapshot server has not published it yet"
    )


def test_a_server_that_only_fails_is_named_with_its_last_failure_and_parked_tasks_too():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0, failures_before_pause=2, max_task_failures=2)
    for lease_id in range(2):
        join(coordinator)
        coordinator.lease_failed("a", lease_id, "environment", "connection refused", now=1.0)
    expected = "server a is paused for 1 s after 2 failures in a row, the last one: environment: connection refused"
    assert what_a_server_waits_for(coordinator, "a", now=1.0) == expected
    assert learner_waits_for(coordinator, now=1.0) == (
        expected + " (1 tasks parked, the last one: task 0: environment: connection refused)"
    )


def test_a_server_out_of_service_is_named_with_its_reason():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    join(coordinator)
    coordinator.heartbeat("a", progress=1, loaded_version=0, now=1.0, out_of_service="its weights are wrong")
    assert learner_waits_for(coordinator, now=1.0) == "server a is out of service: its weights are wrong"
    assert what_a_server_waits_for(coordinator, "a", now=1.0) == "server a is out of service: its weights are wrong"


def test_a_server_waits_for_the_learner_when_a_bound_is_met():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    join(coordinator)
    assert what_a_server_waits_for(coordinator, "a", now=0.0) == (
        "the learner to complete step 1: more data would be older than max_staleness"
    )
    assert what_a_server_waits_for(coordinator, "z", now=0.0) == "this server is not ready"


@pytest.mark.parametrize(
    ("bounds", "held_by", "words"),
    [
        ({}, "max_staleness", "the learner to complete step 1: more data would be older than max_staleness"),
        ({"queue_groups": 3}, "queue_groups", "the learner to empty the queue: 3 of 3 groups are open"),
        (
            {"queue_bytes": 3 * MAX_GROUP_BYTES},
            "queue_bytes",
            "the learner to empty the queue: 40000 of 30000 bytes would be needed",
        ),
    ],
)
def test_the_bound_that_is_met_is_named_in_words_in_the_status_and_in_the_metrics(bounds, held_by, words):
    coordinator = a_coordinator(**({"groups_per_step": 2, "max_staleness": 1} | bounds))
    free = status_of(coordinator, Sessions(), TokenAges(), 0.0, listen_address="tcp://x", strangers={})
    assert (free.held_by, free.servers_wait_for) == ("", "")
    join(coordinator)
    assert what_all_servers_wait_for(coordinator) == words
    status = status_of(coordinator, Sessions(), TokenAges(), 0.0, listen_address="tcp://x", strangers={})
    assert (status.held_by, status.servers_wait_for) == (held_by, words)
    metrics = list(measure_run(status))
    waits = {one.labels["bound"]: one.value for one in metrics if one.name == "servers_wait_for_learner"}
    assert waits == {bound: bound == held_by for bound in ("max_staleness", "queue_groups", "queue_bytes", "depth")}
    assert [one.value for one in metrics if one.name == "learner_waits_for_servers"] == [True]
