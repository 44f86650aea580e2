import pytest

from learner.coordinator.ledger import MAX_FRONTIER_BYTES, MAX_PARKED_REASONS, FrontierError, TaskLedger
from tests.builders_coordinator import a_coordinator, a_group, join


def a_ledger(*, max_failures=1, max_losses=1):
    return TaskLedger(max_failures=max_failures, max_losses=max_losses)


def test_tasks_given_back_come_first_and_the_oldest_of_them_first():
    ledger = a_ledger()
    assert [ledger.next() for _ in range(5)] == [0, 1, 2, 3, 4]
    for task_id in (3, 1, 2):
        ledger.give_back(task_id)
    assert [ledger.next() for _ in range(5)] == [1, 2, 3, 5, 6]


def test_postponed_tasks_alternate_with_new_ones_and_all_come_again():
    ledger = a_ledger()
    for _ in range(3):
        ledger.postpone(ledger.next())
    assert repr(ledger) == "<TaskLedger next task 2, 2 to lease again, 0 parked>"
    assert sorted(ledger.next() for _ in range(4)) == [0, 1, 2, 3]


def test_a_trained_task_leaves_no_trace():
    ledger = a_ledger(max_failures=3)
    ledger.failed(ledger.next(), "boom")
    assert [task.failures for task in ledger.open_tasks(())] == [1]
    ledger.done(ledger.next())
    assert [task.failures for task in ledger.open_tasks((0,))] == [0]


def test_training_a_task_clears_its_failures_in_the_coordinator_too():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    join(coordinator, groups=1)
    coordinator.lease_failed("a", 0, "environment", "boom", now=0.0)
    assert coordinator.book.tasks._trouble.keys() == {0}
    coordinator.group_finished("a", a_group(1, task_id=0), now=0.0)
    coordinator.take_batch(0, now=0.0)
    coordinator.step_completed(1, (1,), now=0.0)
    assert coordinator.book.tasks._trouble == {}


def test_reasons_are_kept_for_the_last_parked_tasks_only():
    ledger = a_ledger()
    for _ in range(MAX_PARKED_REASONS + 5):
        assert ledger.failed(ledger.next(), "boom")
    assert list(ledger.parked.values()) == [""] * 5 + ["boom"] * MAX_PARKED_REASONS


def test_a_frontier_too_large_for_a_message_is_an_error_that_names_the_cause():
    coordinator = a_coordinator()
    tasks = coordinator.book.tasks
    tasks.next_task_id = MAX_FRONTIER_BYTES // 8
    for task_id in range(tasks.next_task_id):
        tasks.postpone(task_id)
    with pytest.raises(FrontierError, match=r"open and 0 parked tasks; find out why so many tasks fail"):
        coordinator.frontier()
