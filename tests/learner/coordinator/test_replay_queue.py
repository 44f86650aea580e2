from collections import Counter

import pytest

from learner.coordinator.replay_queue import ReplayQueue
from tests.builders_coordinator import a_group


def a_queue(*, max_groups=4, max_bytes=10_000):
    return ReplayQueue(max_groups=max_groups, max_bytes=max_bytes)


def test_the_group_with_the_oldest_token_comes_out_first_and_then_the_oldest_lease():
    queue = a_queue()
    for lease_id, oldest in ((5, 1), (3, 1), (9, 0)):
        queue.put(a_group(lease_id, oldest=oldest))
    assert [group.lease_id for group in queue.oldest(2)] == [9, 3]
    assert queue.lease_ids() == (9, 3, 5)
    assert sorted(queue.task_ids()) == [3, 5, 9]
    assert 5 in queue
    assert 4 not in queue


def test_a_group_is_consumed_once():
    queue = a_queue()
    queue.put(a_group(3))
    with pytest.raises(ValueError, match="lease 3 is queued already; a group is consumed once"):
        queue.put(a_group(3))
    assert [group.lease_id for group in queue.consume([3])] == [3]
    with pytest.raises(KeyError):
        queue.consume([3])
    assert len(queue) == 0
    assert queue.num_bytes == 0


def test_a_full_queue_refuses_in_groups_and_in_bytes():
    queue = a_queue(max_groups=1)
    queue.put(a_group(0))
    with pytest.raises(OverflowError, match="has no room for <FinishedGroup lease 1, task 1, 640 bytes"):
        queue.put(a_group(1))
    queue = a_queue(max_bytes=1000)
    queue.put(a_group(0))
    with pytest.raises(OverflowError, match="it was not covered by a credit"):
        queue.put(a_group(1))


def test_the_decoded_header_counts_towards_the_bytes():
    assert a_group(payload_bytes=100).num_bytes == 100 + 512 + 128  # payload, one trajectory, one version run


def test_repr_shows_the_bounds_and_the_oldest_token():
    queue = a_queue()
    assert repr(queue) == "<ReplayQueue 0/4 groups, 0/10000 bytes>"
    queue.put(a_group(7))
    queue.put(a_group(4))
    assert repr(queue) == "<ReplayQueue 2/4 groups, 1280/10000 bytes, oldest token version 0>"


def test_the_versions_of_a_batch_are_those_of_its_groups_whatever_was_consumed_before():
    queue = a_queue(max_groups=8)
    for lease_id, oldest in enumerate((2, 0, 1, 1, 2)):
        queue.put(a_group(lease_id, oldest=oldest))
    for num_groups in range(1, 6):
        oldest = Counter(group.oldest_version for group in queue.oldest(num_groups))
        assert queue.oldest_versions(num_groups) == oldest
    queue.consume([1, 2])
    assert queue.oldest_versions(2) == {1: 1, 2: 1}
    assert queue.oldest_versions(9) == {1: 1, 2: 2}
