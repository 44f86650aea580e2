import random

import pytest

from rollout_server.environments.health import MAX_RETRY_S, Health, retry_delay_s


def a_failed(times: int, *, now: float = 0.0) -> Health:
    health = Health()
    for _ in range(times):
        assert health.admit(now)
        health.note_failure("refused", now, sent_at=now)
    return health


def test_two_failures_in_a_row_keep_nobody_away_and_a_third_does():
    assert a_failed(2).admit(0.0)
    health = a_failed(3)
    assert not health.admit(0.9)
    assert repr(health) == "<Health 3 failures, the last one: refused>"


def test_a_success_in_between_begins_the_count_anew():
    health = a_failed(2)
    health.note_success(0.0)
    health.note_failure("refused", 1.0, sent_at=1.0)
    assert (health.failures_in_a_row, health.is_open) == (1, False)


def test_after_the_pause_one_call_tries_and_its_success_lets_all_through():
    health = a_failed(3)
    assert health.pause_s(0.25) == 0.75
    assert [health.admit(1.0), health.admit(1.0), health.admit(1.0)] == [True, False, False]
    health.note_success(1.1)
    assert all(health.admit(1.1) for _ in range(3))


def test_each_failed_trial_doubles_the_pause_up_to_a_bound():
    health, now, pauses = a_failed(3), 0.0, []
    for _ in range(8):
        pauses.append(health.pause_s(now))
        now += health.pause_s(now)
        assert health.admit(now)
        health.note_failure("refused", now, sent_at=now)
    assert pauses == [1, 2, 4, 4, 4, 4, 4, 4]


def test_calls_that_were_under_way_when_the_pause_began_do_not_prolong_it():
    health = a_failed(3)
    for _ in range(10):
        health.note_failure("refused", 0.5, sent_at=0.0)
    assert health.pause_s(0.5) == 0.5


def test_a_failure_of_a_call_sent_before_a_later_success_says_nothing():
    health = Health()
    health.note_success(5.0)
    for _ in range(10):
        health.note_failure("no reply in time", 30.0, sent_at=4.0)
    assert health.is_proven
    assert not health.is_open


def test_a_trial_that_was_given_up_is_no_verdict_and_another_may_follow():
    health = a_failed(3)
    assert health.admit(1.0)
    health.note_nothing()
    assert health.admit(1.0)


@pytest.mark.parametrize(("tries", "bound"), [(1, 0.25), (2, 0.5), (3, 1.0), (9, MAX_RETRY_S), (10_000, MAX_RETRY_S)])
def test_retries_are_spread_over_a_time_that_doubles(tries, bound):
    delays = [retry_delay_s(tries, random.Random(seed)) for seed in range(300)]
    assert 0 <= min(delays) < 0.1 * bound
    assert 0.9 * bound < max(delays) <= bound
