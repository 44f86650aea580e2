from collections import Counter

from learner.coordinator.members import MAX_OFFENDERS, Member, Offences
from learner.coordinator.records import MAX_ENDED_REMEMBERED, MAX_KINDS, Endings, OpenLease, PastLeases, count
from tests.builders_coordinator import some_settings


def a_member(**overrides):
    values = {
        "server_id": "a",
        "joined": 1,
        "capacity_groups": 4,
        "capacity_bytes": 1000,
        "heard_at": 0.0,
        "progressed_at": 0.0,
    }
    return Member(**(values | overrides))


def fail(member, times, *, now):
    for _ in range(times):
        member.note_failure("boom", failures_before_pause=4, now=now)


def free(member, *, now):
    member.heard_at = now
    return member.free_groups(some_settings(max_group_bytes=10, failures_before_pause=4), now)


def test_pauses_double_up_to_half_a_minute():
    member, pauses, now = a_member(), [], 0.0
    fail(member, 3, now=now)
    assert free(member, now=now) == 4
    for _ in range(7):
        fail(member, 1, now=now)
        assert free(member, now=now) == 0
        pauses.append(member.paused_until - now)
        now = member.paused_until
        assert free(member, now=now) == 1
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_leases_that_fail_together_cause_one_pause_not_many():
    member = a_member()
    fail(member, 64, now=5.0)
    assert member.paused_until == 6.0


def test_one_good_group_ends_the_caution():
    member = a_member()
    fail(member, 10, now=0.0)
    member.note_success()
    assert free(member, now=0.0) == 4


def test_offences_of_invented_identities_take_bounded_memory():
    offences = Offences(limit=2)
    for number in range(MAX_OFFENDERS + 1):
        assert not offences.note(f"peer {number}")
    assert len(offences._counts) == MAX_OFFENDERS
    assert not offences.note("peer 0")
    assert offences.note(f"peer {MAX_OFFENDERS}")


def test_words_invented_by_servers_take_bounded_memory():
    counter = Counter()
    for number in range(MAX_KINDS + 10):
        count(counter, f"kind {number}")
    assert counter["other"] == 10
    assert len(counter) == MAX_KINDS + 1


def test_ended_leases_are_remembered_for_a_while():
    endings = Endings(PastLeases())
    for lease_id in range(MAX_ENDED_REMEMBERED + 1):
        endings.note_failed(
            OpenLease(lease_id=lease_id, task_id=0, server_id="a", min_version=0, deadline=0, granted_at=0.0), "boom"
        )
    assert endings.of(0) == ""
    assert endings.of(1) == "failed (boom)"
