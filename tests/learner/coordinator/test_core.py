import pytest

from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import (
    AcceptGroup,
    CancelLease,
    DeliverBatch,
    DropServer,
    ParkTask,
    Quarantine,
    RefuseGroup,
)
from learner.coordinator.delivery import LearnerError
from learner.coordinator.members import Member
from learner.coordinator.replay_queue import JournaledGroup
from tests.builders_coordinator import (
    MAX_GROUP_BYTES,
    a_coordinator,
    a_group,
    grants,
    group_for,
    join,
    of_kind,
    publishes,
    some_settings,
)


def test_leases_are_granted_up_to_the_bound_of_pacing_and_no_further():
    coordinator = a_coordinator(groups_per_step=4, max_staleness=2)
    granted = join(coordinator)
    assert [grant.lease_id for grant in granted] == list(range(12))  # (v + K + 1) * groups_per_step
    assert coordinator.hold() == "the learner to complete step 1: more data would be older than max_staleness"
    assert grants(coordinator.tick(now=1.0)) == []


def test_many_leases_at_one_moment_do_not_each_look_through_all_that_the_server_has(monkeypatch):
    has_work, looks = Member.has_work, []
    monkeypatch.setattr(Member, "has_work", lambda *arguments: looks.append(1) or has_work(*arguments))
    bounds = {"queue_groups": 2000, "queue_bytes": 2000 * MAX_GROUP_BYTES}
    coordinator = a_coordinator(groups_per_step=300, max_staleness=0, **bounds)
    for grant in join(coordinator, groups=1000):
        coordinator.group_finished("a", group_for(grant), now=1.0)
    [batch] = of_kind(coordinator.take_batch(0, now=2.0), DeliverBatch)
    looks.clear()
    lease_ids = tuple(group.lease_id for group in batch.groups)
    granted = grants(coordinator.step_completed(1, lease_ids, now=3.0))
    assert [grant.min_version for grant in granted] == [1] * 300  # none may be begun before version 1 is published
    assert len(looks) == 1
    assert coordinator.members["a"].progressed_at == 3.0


def test_with_staleness_zero_exactly_one_batch_is_in_flight():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0)
    first = join(coordinator)
    assert [(grant.lease_id, grant.min_version) for grant in first] == [(0, 0), (1, 0)]
    for grant in first:
        assert grants(coordinator.group_finished("a", group_for(grant), now=1.0)) == []
    assert grants(coordinator.take_batch(0, now=1.0)) == []
    second = grants(coordinator.step_completed(1, (0, 1), now=2.0))
    assert [(grant.lease_id, grant.min_version) for grant in second] == [(2, 1), (3, 1)]


def test_a_lease_forbids_policies_that_would_be_too_old_at_the_step_it_is_trained_in():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=1)
    granted = join(coordinator)
    for version in range(5):
        for grant in granted[-2:] if version else granted:
            coordinator.group_finished("a", group_for(grant), now=1.0)
        delivered = of_kind(coordinator.take_batch(version, now=1.0), DeliverBatch)[0]
        granted = grants(coordinator.step_completed(version + 1, tuple(g.lease_id for g in delivered.groups), now=1.0))
        publishes(coordinator, version + 1)
        # Trained in step version + 2, so nothing older than version + 1 may be in it.
        assert [grant.min_version for grant in granted] == [version + 1] * 2


def test_a_batch_goes_without_running_leases_as_long_as_they_can_be_trained_in_time():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=1)
    granted = join(coordinator)
    assert of_kind(coordinator.take_batch(0, now=0.0), DeliverBatch) == []
    assert of_kind(coordinator.group_finished("a", group_for(granted[3]), now=1.0), DeliverBatch) == []
    [batch] = of_kind(coordinator.group_finished("a", group_for(granted[2]), now=1.0), DeliverBatch)
    assert batch.version == 0
    assert [group.task_id for group in batch.groups] == [2, 3]  # in task order, whatever came first
    coordinator.step_completed(1, (2, 3), now=2.0)
    publishes(coordinator, 1)
    coordinator.take_batch(1, now=2.0)
    for lease_id in (4, 5):  # sampled by version 1: they could go into the next batch, but leases 0 and 1 are due now
        group = a_group(lease_id, oldest=1)
        assert of_kind(coordinator.group_finished("a", group, now=3.0), DeliverBatch) == []
    assert of_kind(coordinator.group_finished("a", group_for(granted[1]), now=3.0), DeliverBatch) == []
    [batch] = of_kind(coordinator.group_finished("a", group_for(granted[0]), now=3.0), DeliverBatch)
    assert [group.lease_id for group in batch.groups] == [0, 1]


def test_with_the_stale_action_mask_a_batch_waits_for_nobody():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0, stale_action="mask", queue_groups=4)
    granted = join(coordinator)
    coordinator.take_batch(0, now=0.0)
    coordinator.group_finished("a", group_for(granted[0]), now=1.0)
    failed = coordinator.lease_failed("a", granted[1].lease_id, "environment", "boom", now=1.0)
    [again] = grants(failed)
    [batch] = of_kind(coordinator.group_finished("a", group_for(again), now=1.0), DeliverBatch)
    assert [group.task_id for group in batch.groups] == [0, 1]


def a_batch_kept_waiting(**overrides):
    """One slow lease of version 0 is due at step 1; everything else that is needed is there."""
    coordinator = a_coordinator(groups_per_step=2, max_staleness=1, **overrides)
    granted = join(coordinator)
    coordinator.take_batch(0, now=0.0)
    for grant in granted[1:3]:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    coordinator.step_completed(1, (1, 2), now=1.0)
    publishes(coordinator, 1)
    for lease_id in (3, 4):
        coordinator.group_finished("a", a_group(lease_id, oldest=coordinator.book.running[lease_id].min_version), 1.0)
    return coordinator


def test_with_the_stale_action_wait_a_batch_waits_for_a_group_that_is_due():
    assert of_kind(a_batch_kept_waiting().take_batch(1, now=2.0), DeliverBatch) == []


def test_with_the_stale_action_mask_a_batch_goes_without_a_group_that_is_due():
    [batch] = of_kind(a_batch_kept_waiting(stale_action="mask").take_batch(1, now=2.0), DeliverBatch)
    assert [group.lease_id for group in batch.groups] == [3, 4]


def test_with_the_stale_action_requeue_a_group_that_is_due_is_given_up_and_its_task_leased_again():
    coordinator = a_batch_kept_waiting(stale_action="requeue")
    decisions = coordinator.take_batch(1, now=2.0)
    [cancelled] = of_kind(decisions, CancelLease)
    assert (cancelled.lease_id, cancelled.reason) == (0, "its tokens would be older than 1 versions after this step")
    [batch] = of_kind(decisions, DeliverBatch)
    assert [group.lease_id for group in batch.groups] == [3, 4]
    assert grants(decisions)[0].task_id == 0
    assert coordinator.counts().cancelled == {"requeued": 1}


def test_a_task_that_was_given_up_too_often_is_waited_for():
    coordinator = a_batch_kept_waiting(stale_action="requeue", max_requeues=0)
    assert coordinator.take_batch(1, now=2.0) == []


def test_a_group_may_only_claim_versions_that_its_server_has_said_it_loaded():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=1)
    for grant in join(coordinator)[:2]:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    coordinator.take_batch(0, now=1.0)
    coordinator.step_completed(1, (0, 1), now=1.0)
    coordinator.published(1, now=1.0)
    claims = coordinator.group_finished("a", a_group(2, oldest=0, newest=1), now=1.0)
    [refused] = of_kind(claims, RefuseGroup)
    assert (refused.kind, refused.reason) == ("unconfirmed_version", "a token claims version 1, the server said 0")
    publishes(coordinator, 1)
    assert of_kind(coordinator.group_finished("a", a_group(3, oldest=0, newest=1), now=1.0), AcceptGroup)


def test_a_failed_leases_task_is_leased_again_first():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=1)
    join(coordinator)
    decisions = coordinator.lease_failed("a", 0, "environment", "raised KeyError", now=2.0)
    [again] = grants(decisions)
    assert (again.lease_id, again.task_id) == (4, 0)


def test_a_task_that_keeps_failing_while_others_succeed_is_parked_by_name_and_others_go_on():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=1, max_task_failures=3)
    open_leases = join(coordinator)
    parked = []
    for _ in range(3):
        poison = next(grant for grant in open_leases if grant.task_id == 0)
        good = next(grant for grant in open_leases if grant.task_id != 0)
        coordinator.group_finished("a", group_for(good), now=1.0)
        decisions = coordinator.lease_failed("a", poison.lease_id, "environment", "raised KeyError", now=1.0)
        open_leases = [grant for grant in open_leases if grant not in (poison, good)] + grants(decisions)
        parked += of_kind(decisions, ParkTask)
    assert parked == [ParkTask(task_id=0, reason="environment: raised KeyError")]
    assert all(grant.task_id != 0 for grant in open_leases)
    assert coordinator.counts().failed == {"environment": 3}


WRONG_WEIGHTS = "with version 4 loaded, the engine's log-probabilities are wrong"


def test_a_server_out_of_service_is_granted_nothing_and_what_it_has_not_finished_goes_to_others_unblamed():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0, max_task_failures=1)
    granted = join(coordinator)
    assert [grant.server_id for grant in granted] == ["a", "a"]
    join(coordinator, "b")
    coordinator.group_finished("a", group_for(granted[0]), now=1.0)
    again = grants(coordinator.heartbeat("a", progress=1, loaded_version=0, now=2.0, out_of_service=WRONG_WEIGHTS))
    assert [(grant.server_id, grant.task_id) for grant in again] == [("b", granted[1].task_id)]
    assert coordinator.counts().failed == {"out_of_service": 1}
    assert coordinator.counts().queued == 1  # what it finished is older than the doubt
    assert coordinator.book.tasks.parked == {}
    assert "a" in coordinator.members
    [refused] = of_kind(coordinator.group_finished("a", group_for(granted[1]), now=3.0), RefuseGroup)
    assert refused.kind == "ended"


def test_a_server_is_granted_leases_again_with_the_first_heartbeat_that_says_that_it_is_in_service():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    join(coordinator)
    for now in (1.0, 2.0, 30.0):
        out = coordinator.heartbeat("a", progress=1, loaded_version=0, now=now, out_of_service=WRONG_WEIGHTS)
        assert grants(out) == []
        assert grants(coordinator.tick(now=now)) == []
    assert len(grants(coordinator.heartbeat("a", progress=1, loaded_version=0, now=31.0))) == 1
    assert coordinator.counts().failed == {"out_of_service": 1}


def test_while_nothing_succeeds_no_task_is_parked_and_leases_come_one_at_a_time_ever_more_slowly():
    coordinator = a_coordinator(groups_per_step=8, failures_before_pause=4)
    open_leases, now, probes = join(coordinator), 0.0, []
    for grant in open_leases:
        assert (
            of_kind(coordinator.lease_failed("a", grant.lease_id, "environment", "connection refused", now), ParkTask)
            == []
        )
    while now < 3600.0:
        now += 1.0
        coordinator.heartbeat("a", progress=int(now), loaded_version=0, now=now)
        for lease_id in list(coordinator.book.running):
            probes.append(now)
            assert (
                of_kind(coordinator.lease_failed("a", lease_id, "environment", "connection refused", now), ParkTask)
                == []
            )
    assert 100 < len(probes) < 140  # about every 30 s: an outage of an hour does not use up the data set
    assert coordinator.book.tasks.parked == {}


def test_a_task_that_always_fails_does_not_stop_a_run_of_one_lease_at_a_time():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    poison, now, version = set(range(10)), 0.0, 0
    join(coordinator)
    coordinator.take_batch(0, now)
    while version < 5 and now < 2000.0:
        now += 1.0
        coordinator.heartbeat("a", progress=int(now), loaded_version=version, now=now)
        for lease in list(coordinator.book.running.values()):
            if lease.task_id in poison:
                coordinator.lease_failed("a", lease.lease_id, "environment", "raised KeyError", now)
                continue
            group = a_group(lease.lease_id, lease.task_id, oldest=version)
            if of_kind(coordinator.group_finished("a", group, now), DeliverBatch):
                version += 1
                coordinator.step_completed(version, (lease.lease_id,), now)
                publishes(coordinator, version, now=now)
                coordinator.take_batch(version, now)
    assert version == 5


def test_a_server_that_only_fails_gets_leases_only_when_the_others_are_full():
    coordinator = a_coordinator(groups_per_step=4, max_staleness=0)
    join(coordinator, "broken", groups=100)
    join(coordinator, "good", groups=2)
    again = [coordinator.lease_failed("broken", lease_id, "engine", "dead", now=1.0) for lease_id in range(3)]
    assert [grant.server_id for decisions in again for grant in grants(decisions)] == ["good", "good", "broken"]


def test_the_server_with_most_free_capacity_is_granted_first():
    coordinator = Coordinator(some_settings(max_staleness=0), servers_return_until=1.0)
    coordinator.published(0, now=0.0)
    for server_id, groups in (("a", 1), ("b", 4)):
        assert join(coordinator, server_id, groups=groups) == []
    assert [grant.server_id for grant in grants(coordinator.tick(now=1.0))] == ["b", "b"]


def test_a_server_whose_lease_ended_has_room_again_and_one_that_left_has_none():
    coordinator = a_coordinator(groups_per_step=10)
    [first] = join(coordinator, "a", groups=1)
    [other] = join(coordinator, "b", groups=1)
    assert grants(coordinator.tick(now=1.0)) == []
    decisions = coordinator.lease_failed("a", first.lease_id, "boom", "", now=1.0)
    assert [(grant.server_id, grant.task_id) for grant in grants(decisions)] == [("a", first.task_id)]
    assert grants(coordinator.server_left("b", "enough", now=1.0)) == []
    [again] = grants(coordinator.server_ready("a", capacity_groups=2, capacity_bytes=1 << 30, now=1.0))[1:]
    assert (again.server_id, again.task_id) == ("a", other.task_id)


def test_a_server_never_holds_more_than_its_capacity_in_groups_and_bytes():
    coordinator = a_coordinator(groups_per_step=50)
    assert len(join(coordinator, "a", groups=3)) == 3
    assert len(join(coordinator, "b", num_bytes=5 * MAX_GROUP_BYTES + 1)) == 5


def test_a_server_too_small_for_one_group_is_told_so():
    coordinator = a_coordinator()
    decisions = coordinator.server_ready("a", capacity_groups=1, capacity_bytes=MAX_GROUP_BYTES - 1, now=0.0)
    [drop] = of_kind(decisions, DropServer)
    assert drop.reason.startswith("the server takes 9999 bytes of unfinished groups, but one group may have 10000;")
    assert coordinator.members == {}


def test_the_queue_is_bounded_in_groups_while_leases_reserve_their_place():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=10, queue_groups=5)
    granted = join(coordinator)
    assert len(granted) == 5
    assert grants(coordinator.group_finished("a", group_for(granted[0]), now=1.0)) == []
    assert coordinator.hold() == "the learner to empty the queue: 5 of 5 groups are open"


def test_the_queue_is_bounded_in_bytes_and_small_groups_give_their_reserve_back():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=10, queue_bytes=4 * MAX_GROUP_BYTES)
    granted = join(coordinator)
    assert len(granted) == 4
    for grant in granted[:1]:
        assert grants(coordinator.group_finished("a", group_for(grant, payload_bytes=8000), now=1.0)) == []
    assert len(grants(coordinator.group_finished("a", group_for(granted[1]), now=1.0))) == 1
    reserved = coordinator.book.queue.num_bytes + len(coordinator.book.running) * MAX_GROUP_BYTES
    assert reserved <= 4 * MAX_GROUP_BYTES


def test_credits_come_back_only_when_the_step_is_completed():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0)
    for grant in join(coordinator):
        coordinator.group_finished("a", group_for(grant), now=1.0)
    assert grants(coordinator.take_batch(0, now=1.0)) == []
    assert coordinator.counts().queued == 2
    assert len(grants(coordinator.step_completed(1, (0, 1), now=2.0))) == 2
    assert coordinator.counts().trained == 2


def test_a_group_sent_twice_is_accepted_once():
    coordinator = a_coordinator()
    [grant, *_] = join(coordinator)
    assert of_kind(coordinator.group_finished("a", group_for(grant), now=1.0), AcceptGroup)
    [refused] = coordinator.group_finished("a", group_for(grant), now=1.0)
    assert refused == RefuseGroup(
        server_id="a", lease_id=0, kind="duplicate", reason="lease 0: a group of it was accepted before"
    )
    assert coordinator.counts().queued == 1
    assert coordinator.counts().refused == {"duplicate": 1}


def test_a_group_of_another_servers_lease_is_refused_and_the_lease_goes_on():
    coordinator = a_coordinator()
    [grant, *_] = join(coordinator, "a")
    join(coordinator, "b")
    [refused] = of_kind(coordinator.group_finished("b", group_for(grant), now=1.0), RefuseGroup)
    assert refused.kind == "not_yours"
    assert of_kind(coordinator.group_finished("a", group_for(grant), now=1.0), AcceptGroup)


def test_a_group_of_a_lease_that_was_never_granted_is_refused():
    coordinator = a_coordinator()
    join(coordinator)
    [refused] = of_kind(coordinator.group_finished("a", a_group(lease_id=77), now=1.0), RefuseGroup)
    assert (refused.kind, refused.reason) == ("not_yours", "lease 77: it was never granted to this server")


@pytest.mark.parametrize(
    ("group", "kind"),
    [
        (a_group(0, task_id=5), "wrong_task"),
        (a_group(0, payload_bytes=MAX_GROUP_BYTES), "too_large"),
        (a_group(0, oldest=0, newest=1), "future_version"),
    ],
)
def test_a_group_that_does_not_fulfil_its_lease_fails_it(group, kind):
    coordinator = a_coordinator()
    join(coordinator)
    decisions = coordinator.group_finished("a", group, now=1.0)
    assert of_kind(decisions, RefuseGroup)[0].kind == kind
    assert coordinator.counts().failed == {kind: 1}
    assert [grant.task_id for grant in grants(decisions)] == [0]


def test_a_group_sampled_by_an_older_policy_than_its_lease_allows_is_refused():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    [grant] = join(coordinator)
    coordinator.group_finished("a", group_for(grant), now=1.0)
    coordinator.take_batch(0, now=1.0)
    [grant] = grants(coordinator.step_completed(1, (0,), now=1.0))
    assert grant.min_version == 1
    decisions = coordinator.group_finished("a", group_for(grant, sampled_at=0), now=1.0)
    assert of_kind(decisions, RefuseGroup)[0].kind == "too_stale"


def test_a_silent_server_is_lost_its_leases_expire_once_and_its_late_group_is_refused():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0, server_timeout_s=5.0)
    first = join(coordinator, "a", now=0.0)
    join(coordinator, "b", now=0.0)
    for now in range(1, 6):
        coordinator.heartbeat("b", progress=now, loaded_version=0, now=float(now))
        assert coordinator.tick(now=float(now)) == []
    coordinator.heartbeat("b", progress=6, loaded_version=0, now=6.0)
    decisions = coordinator.tick(now=6.0)
    assert of_kind(decisions, DropServer) == [DropServer(server_id="a", reason="not heard of for 6 s")]
    assert [cancel.lease_id for cancel in of_kind(decisions, CancelLease)] == [0, 1]
    assert [(grant.server_id, grant.lease_id, grant.task_id) for grant in grants(decisions)] == [
        ("b", 2, 0),
        ("b", 3, 1),
    ]
    [refused] = coordinator.group_finished("a", group_for(first[0]), now=7.0)
    assert (refused.kind, refused.reason) == ("ended", "lease 0: it expired: server a was lost")
    assert coordinator.counts().expired == 2
    assert coordinator.server_lost("a", "again", now=8.0) == []


def test_a_server_without_progress_is_lost_only_while_it_has_work_it_can_do():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0, hang_timeout_s=20.0)
    [grant] = join(coordinator)
    for now in range(1, 20):
        coordinator.heartbeat("a", progress=1, loaded_version=0, now=float(now))
        assert of_kind(coordinator.tick(now=float(now)), DropServer) == []
    coordinator.group_finished("a", group_for(grant), now=20.0)
    coordinator.take_batch(0, now=20.0)
    coordinator.step_completed(1, (0,), now=20.0)  # the next lease needs snapshot 1, which is not published yet
    for now in range(20, 60):
        coordinator.heartbeat("a", progress=1, loaded_version=0, now=float(now))
        assert of_kind(coordinator.tick(now=float(now)), DropServer) == []
    coordinator.published(1, now=60.0)
    for now in range(60, 81):
        coordinator.heartbeat("a", progress=1, loaded_version=0, now=float(now))
        assert of_kind(coordinator.tick(now=float(now)), DropServer) == []
    coordinator.heartbeat("a", progress=1, loaded_version=0, now=81.0)
    [drop] = of_kind(coordinator.tick(now=81.0), DropServer)
    assert drop.reason == "alive, but no progress on its 1 leases for 21 s"


def test_nobody_is_lost_because_the_coordinator_itself_was_stopped():
    coordinator = a_coordinator(server_timeout_s=10.0)
    join(coordinator, now=0.0)
    coordinator.tick(now=1.0)
    assert of_kind(coordinator.tick(now=100.0), DropServer) == []
    for now in range(101, 109):
        assert of_kind(coordinator.tick(now=float(now)), DropServer) == []
    assert of_kind(coordinator.tick(now=112.0), DropServer) != []


def test_a_server_that_leaves_gives_its_leases_to_others_at_once_and_no_task_is_blamed():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0, max_task_losses=1, max_task_failures=1)
    join(coordinator, "a")
    join(coordinator, "b")
    decisions = coordinator.server_left("a", "SIGTERM", now=1.0)
    assert [(grant.server_id, grant.task_id) for grant in grants(decisions)] == [("b", 0), ("b", 1)]
    assert coordinator.counts().cancelled == {"server_left": 2}
    assert of_kind(decisions, ParkTask) == []


def test_a_task_that_loses_server_after_server_is_parked():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0, max_task_losses=2)
    for server_id in ("a", "b"):
        join(coordinator, server_id)
        parked = of_kind(coordinator.server_lost(server_id, "out of memory", now=1.0), ParkTask)
    assert parked == [ParkTask(task_id=0, reason="server b was lost: out of memory")]


def test_a_member_that_was_cut_off_is_told_its_open_leases_again():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=1)
    first = join(coordinator)
    assert join(coordinator) == first
    assert coordinator.counts().leased == 2


def test_a_peer_that_keeps_sending_rubbish_is_quarantined_and_a_good_group_clears_it():
    coordinator = a_coordinator(max_offences=3)
    [grant, *_] = join(coordinator)
    for _ in range(2):
        assert coordinator.offence("a", "garbage", now=1.0) == []
    coordinator.group_finished("a", group_for(grant), now=1.0)
    for _ in range(2):
        assert coordinator.offence("a", "garbage", now=1.0) == []
    decisions = coordinator.offence("a", "garbage", now=1.0)
    assert of_kind(decisions, Quarantine) == [
        Quarantine(server_id="a", reason="3 offences without a good group, the last one: garbage")
    ]
    assert coordinator.members == {}
    assert coordinator.counts().cancelled == {"quarantined": 3}


def test_a_batch_asked_for_again_is_delivered_again_until_the_step_is_completed():
    coordinator = a_coordinator()
    for grant in join(coordinator)[:2]:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    charged = coordinator.book.queue.num_bytes
    for _ in range(2):
        [batch] = of_kind(coordinator.take_batch(0, now=1.0), DeliverBatch)
        assert [group.lease_id for group in batch.groups] == [0, 1]
        assert coordinator.book.queue.num_bytes == charged
        assert all(isinstance(group, JournaledGroup) for group in coordinator.book.queue.oldest(2))  # bytes are gone
    coordinator.step_completed(1, (0, 1), now=1.0)
    with pytest.raises(LearnerError, match="asks for the batch of version 0, the run is at 1"):
        coordinator.take_batch(0, now=1.0)


@pytest.mark.parametrize(("version", "lease_ids"), [(1, (0,)), (2, (0, 1)), (1, (1, 0)), (1, ())])
def test_a_step_that_was_not_delivered_cannot_be_completed(version, lease_ids):
    coordinator = a_coordinator()
    for grant in join(coordinator)[:2]:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    coordinator.take_batch(0, now=1.0)
    with pytest.raises(LearnerError, match="delivered leases"):
        coordinator.step_completed(version, lease_ids, now=1.0)


def test_a_snapshot_of_a_version_that_does_not_exist_cannot_be_published():
    coordinator = a_coordinator()
    with pytest.raises(LearnerError, match="snapshot 1 was published, after 0; the run is at 0"):
        coordinator.published(1, now=0.0)


def test_a_closed_run_cancels_what_runs_and_grants_nothing():
    coordinator = a_coordinator()
    join(coordinator)
    decisions = coordinator.close("all steps done")
    assert len(of_kind(decisions, CancelLease)) == 4
    assert join(coordinator) == []
    assert coordinator.counts().balanced


def test_repr_shows_what_an_operator_asks_for():
    coordinator = a_coordinator()
    granted = join(coordinator)
    coordinator.group_finished("a", group_for(granted[1], payload_bytes=360), now=1.0)
    assert repr(coordinator) == (
        "<Coordinator version 0, 1 servers, 3 running, "
        "<ReplayQueue 1/100 groups, 1000/1000000 bytes, oldest token version 0>, "
        "<TaskLedger next task 4, 0 to lease again, 0 parked>, "
        "waits for the learner to complete step 1: more data would be older than max_staleness>"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"groups_per_step": 0}, "groups_per_step must be >= 1, got 0"),
        ({"max_staleness": -1}, "max_staleness must be >= 0, got -1; 0 means strictly on-policy"),
        ({"queue_groups": 1}, "can never hold a batch of 2; set queue_groups to at least 2"),
        ({"queue_bytes": 2 * MAX_GROUP_BYTES - 1}, "set queue_bytes to at least 20000"),
    ],
)
def test_settings_under_which_a_batch_could_never_fill_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        some_settings(**overrides)


def test_a_lease_asks_for_no_older_version_than_its_server_has_so_that_it_is_due_later():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=3)
    for grant in join(coordinator)[:2]:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    coordinator.take_batch(0, now=1.0)
    coordinator.step_completed(1, (0, 1), now=1.0)
    publishes(coordinator, 1)
    for lease_id in (2, 3):
        coordinator.group_finished("a", a_group(lease_id), now=1.0)
    coordinator.take_batch(1, now=1.0)
    coordinator.step_completed(2, (2, 3), now=1.0)
    last = list(coordinator.book.running.values())[-1]
    assert (last.min_version, last.deadline) == (2 + 7 // 2 - 3, 5)
    assert [lease.min_version for lease in coordinator.book.running.values()][-2:] == [2, 2]
    [again] = grants(coordinator.lease_failed("a", 8, "environment", "boom", now=1.0))
    assert again.min_version == 2


def test_a_batch_is_in_task_order_whatever_the_order_of_the_leases():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=0)
    granted = join(coordinator)
    [again] = grants(coordinator.lease_failed("a", 0, "environment", "boom", now=1.0))
    assert (again.lease_id, again.task_id) == (2, 0)
    coordinator.take_batch(0, now=1.0)
    coordinator.group_finished("a", group_for(granted[1]), now=1.0)
    [batch] = of_kind(coordinator.group_finished("a", group_for(again), now=1.0), DeliverBatch)
    assert [(group.task_id, group.lease_id) for group in batch.groups] == [(0, 2), (1, 1)]


def test_a_server_that_is_silent_for_a_moment_is_granted_nothing_more_and_keeps_what_it_has():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0, notice_timeout_s=2.5, server_timeout_s=10.0)
    [grant] = join(coordinator, now=0.0)
    assert grants(coordinator.lease_failed("a", grant.lease_id, "environment", "boom", now=0.0))
    join(coordinator, "b", now=3.0)
    coordinator.heartbeat("b", progress=1, loaded_version=0, now=3.0)
    assert coordinator.tick(now=3.0) == []
    [lease] = coordinator.book.running.values()
    assert lease.server_id == "a"
    coordinator.server_lost("a", "test", now=3.0)
    join(coordinator, "a", now=3.0)
    coordinator.server_lost("b", "test", now=6.0)  # "a" is silent since 3 s, and nobody else is there
    assert coordinator.counts().running == 0


def test_leases_are_held_back_when_those_that_are_open_keep_the_learner_busy():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=3)
    coordinator.book.bounds.depth.leases = 3
    assert len(join(coordinator)) == 3
    assert coordinator.hold() == "the learner to complete step 1: 3 open groups keep it busy"


def test_a_batch_asked_for_again_is_the_same_whatever_has_arrived_since():
    coordinator = a_coordinator(groups_per_step=2, max_staleness=3)
    join(coordinator)
    for lease_id in (2, 3):
        coordinator.group_finished("a", a_group(lease_id), now=1.0)
    [first] = of_kind(coordinator.take_batch(0, now=1.0), DeliverBatch)
    coordinator.group_finished("a", a_group(0), now=1.0)  # as old, and of an older lease
    [again] = of_kind(coordinator.take_batch(0, now=1.0), DeliverBatch)
    assert [group.lease_id for group in again.groups] == [group.lease_id for group in first.groups] == [2, 3]


def test_a_server_that_was_given_up_while_it_hung_gets_one_lease_at_a_time_until_it_finishes_one():
    coordinator = a_coordinator(groups_per_step=8, max_staleness=0, server_timeout_s=1e6, hang_timeout_s=10.0)
    join(coordinator, "hangs", groups=8)
    coordinator.tick(now=0.0)
    coordinator.heartbeat("hangs", progress=0, loaded_version=0, now=20.0)
    join(coordinator, "works", groups=2, now=20.0)
    coordinator.tick(now=20.0)
    again = join(coordinator, "hangs", groups=8, now=20.0)
    assert [grant.server_id for grant in again] == ["hangs"]
    coordinator.group_finished("hangs", group_for(again[0]), now=21.0)
    assert len(coordinator.members["hangs"].leases) == 5
