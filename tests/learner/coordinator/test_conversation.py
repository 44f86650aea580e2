"""What the coordinator says to rollout servers, without sockets."""

import msgspec
import pytest

from common.codec import pack_group
from common.environments import Environments
from common.messages import (
    PROTOCOL_VERSION,
    AdapterNeeds,
    Finished,
    GroupRefused,
    GroupsAccepted,
    GroupsFinished,
    Lease,
    LeaseCancelled,
    LeaseFailed,
    Leaving,
    Pulse,
    Refused,
    Welcome,
)
from common.together import join_payloads
from common.wire import Peer
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import AcceptGroup, RefuseGroup
from learner.coordinator.inbound import JOINING_TIMEOUT_S, Inbound
from learner.coordinator.outbound import MAX_BLOCKED, Outbound
from learner.coordinator.proofs import LeaseProofs
from learner.coordinator.status import status_of
from learner.coordinator.tasks import Task
from learner.coordinator.token_ages import TokenAges
from tests.builders_coordinator import (
    a_group,
    a_heartbeat,
    a_hello,
    a_ready,
    a_sampled_group,
    an_open_run,
    one_by_one,
    some_service_settings,
    some_settings,
)

A, B = Peer(b"a", "key of a"), Peer(b"b", "key of b")

PROOFS = LeaseProofs(bytes.fromhex(some_service_settings().lease_secret))


class Desk:
    """The coordinator without sockets: say something, hear what is answered."""

    def __init__(self, *, published=0, **rules):
        settings = some_service_settings(rules=some_settings(**rules))
        self.core = Coordinator(settings.rules)
        self.core.published(published, 0.0)
        self.outbound = Outbound(settings, self.core)
        self.inbound = Inbound(settings, self.core, an_open_run(), self.outbound, session="session-1")

    def say(self, peer, message, payload=b"", now=0.0):
        self.inbound.hear(peer, message, payload, now)
        return self.answers()

    def answers(self):
        """What is said once everything that had to be written is written."""
        _, promises = self.outbound.take_records()
        self.outbound.acknowledge([each for each in promises if isinstance(each, AcceptGroup | RefuseGroup)])
        for grant in list(self.outbound.grants):
            self.outbound.lend(grant.server_id, [(grant, Task(row=b'{"prompt": "x"}', seed=grant.task_id))])
        self.outbound.grants.clear()
        letters = [(letter.peer, one) for letter in self.outbound.letters for one in one_by_one(letter.message)]
        self.outbound.letters.clear()
        return letters

    def join(self, peer=A, now=0.0, **ready):
        name = peer.routing_id.decode()
        self.say(peer, a_hello(name, epoch=f"epoch of {name}"), now=now)
        answers = self.say(peer, a_ready(**ready), now=now)
        if self.core.members:
            self.core.heartbeat(name, progress=0, loaded_version=self.core.book.published_version, now=now)
        return answers

    def finish(self, peer, lease, now=0.0, **changes):
        header, payload = pack_group(a_sampled_group(lease.lease_id, lease.task_id, **changes))
        return self.say(peer, GroupsFinished(groups=(header,)), payload, now=now)


def test_hello_is_answered_by_what_the_server_must_load_and_how_it_must_sample():
    [(peer, welcome)] = Desk().say(A, a_hello())
    assert peer == A
    assert welcome == Welcome(
        run_id="run",
        session="session-1",
        model="tiny",
        model_fingerprint="model-1",
        tokenizer_fingerprint="tokenizer-1",
        dtype="float32",
        environments=Environments.at("python:tasks:environment").specs,
        max_model_len=16,
        max_new_tokens=8,
        temperature=1.0,
        weights_address="tcp://127.0.0.1:6000",
        published_version=0,
    )


def test_servers_are_told_what_adapters_their_engine_must_have_room_for():
    desk, needs = Desk(), AdapterNeeds(rank=8, target_modules=("q_proj",), versions=4)
    desk.inbound.run = msgspec.structs.replace(desk.inbound.run, adapters=needs)
    [(_, welcome)] = desk.say(A, a_hello())
    assert welcome.adapters == needs


def test_another_protocol_is_refused_with_both_versions_named():
    [(_, refused)] = Desk().say(A, a_hello(protocol=99))
    assert refused == Refused(
        reason=f"the server speaks protocol 99, the learner {PROTOCOL_VERSION}; "
        "install the same version of countercurrent on both"
    )


def test_a_ready_server_is_lent_its_leases():
    leases = Desk().join(capacity_groups=1)
    assert leases == [
        (
            A,
            Lease(
                lease_id=0,
                task_id=0,
                environment="python:tasks:environment",
                row=b'{"prompt": "x"}',
                group_size=2,
                seed=0,
                min_version=0,
                max_group_bytes=10_000,
                proof=PROOFS.of(lease_id=0, task_id=0, min_version=0, holder="key of a epoch of a"),
            ),
        )
    ]


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_server_with_another_model_or_tokenizer_is_refused_and_gets_nothing(what):
    desk = Desk()
    [(_, refused)] = desk.join(**{f"{what}_fingerprint": "other"})
    assert refused == Refused(
        reason=f"the server's {what} has fingerprint other, the learner's {what}-1; "
        "load tiny, the same revision, on both"
    )
    assert desk.core.members == {}
    assert len(desk.outbound.sessions) == 0


def test_a_connection_that_has_not_said_hello_is_asked_to():
    [(_, refused)] = Desk().say(A, a_heartbeat())
    assert refused == Refused(reason="the coordinator does not know this connection; say Hello", retry=True)


def test_a_group_is_accepted_once():
    desk = Desk()
    [(_, lease), *_] = desk.join()
    assert (A, GroupsAccepted(lease_ids=(0,))) in desk.finish(A, lease)
    assert desk.finish(A, lease) == [(A, GroupRefused(lease_id=0, reason="lease 0: a group of it was accepted before"))]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"samples": 1}, "group: expected 2 trajectories, got 1"),
        ({"token_id": 100}, "trajectory 0.token_ids: expected ids < 100, got 100"),
        ({"version": 1}, "trajectory 0: sampled by version 1, the newest is 0"),
    ],
)
def test_a_group_that_this_run_cannot_have_asked_for_fails_its_lease_and_its_task_is_leased_again(changes, reason):
    desk = Desk()
    [(_, lease), *_] = desk.join()
    refused, again = desk.finish(A, lease, **changes)
    assert refused == (A, GroupRefused(lease_id=0, reason=reason))
    assert (again[1].lease_id, again[1].task_id) == (4, 0)
    assert desk.core.counts().failed == {"invalid": 1}


def together(*groups):
    """The message with all of them."""
    headers, payloads = zip(*map(pack_group, groups), strict=True)
    return GroupsFinished(groups=headers), join_payloads(headers, payloads)


def test_groups_whose_payload_does_not_fit_their_headers_are_refused_as_a_whole_and_their_leases_go_on():
    desk = Desk()
    leases = [lease for _, lease in desk.join()][:2]
    message, payload = together(*(a_sampled_group(lease.lease_id, lease.task_id) for lease in leases))
    [(_, refused)] = desk.say(A, message, payload[:-1])
    reason = "this cannot be read: payload: expected 108 bytes for 12 tokens, got 107"
    assert refused == Refused(reason=reason, retry=True)
    assert (desk.core.counts().running, desk.core.counts().refused) == (4, {"garbage": 1})
    assert desk.say(A, message, payload)[:2] == [(A, GroupsAccepted(lease_ids=(one.lease_id,))) for one in leases]


@pytest.mark.parametrize("changes", [{"samples": 1}, {"token_id": 100}, {"version": 1}])
def test_of_groups_that_come_together_a_bad_one_is_refused_by_itself_and_the_others_are_taken(changes):
    desk = Desk()
    first, second, third = [lease for _, lease in desk.join()][:3]
    good = [a_sampled_group(lease.lease_id, lease.task_id) for lease in (first, third)]
    bad = a_sampled_group(second.lease_id, second.task_id, **changes)
    answers = [answer for _, answer in desk.say(A, *together(good[0], bad, good[1]))]
    assert [each.lease_ids for each in answers if isinstance(each, GroupsAccepted)] == [(0,), (2,)]
    assert [each.lease_id for each in answers if isinstance(each, GroupRefused)] == [1]
    queued = desk.core.book.batches.queue.oldest(2)
    assert [(group.header, group.payload) for group in queued] == [pack_group(group) for group in good]


def test_a_lease_that_is_fulfilled_twice_in_one_message_is_fulfilled_once():
    desk = Desk()
    lease = desk.join()[0][1]
    answers = desk.say(A, *together(*(a_sampled_group(lease.lease_id, lease.task_id) for _ in range(3))))
    refused = (A, GroupRefused(lease_id=0, reason="lease 0: a group of it was accepted before"))
    assert answers == [(A, GroupsAccepted(lease_ids=(0,))), refused, refused]


def test_groups_without_a_lease_are_refused_beside_one_that_has_one():
    desk = Desk(max_offences=100)
    lease = desk.join()[0][1]
    foreign = [a_sampled_group(lease_id, 0) for lease_id in (70, 80)]
    message = together(foreign[0], a_sampled_group(lease.lease_id, lease.task_id), foreign[1])
    answers = [answer for _, answer in desk.say(A, *message)]
    assert [each.lease_id for each in answers if isinstance(each, GroupRefused)] == [70, 80]
    assert GroupsAccepted(lease_ids=(0,)) in answers


def test_a_group_that_is_queued_keeps_none_of_those_in_memory_that_came_with_it():
    desk = Desk()
    lease = desk.join()[0][1]
    message, payload = together(*(a_sampled_group(lease.lease_id, lease.task_id) for _ in range(3)))
    desk.say(A, message, memoryview(payload))
    [group] = desk.core.book.batches.queue.oldest(3)
    assert (type(group.payload), len(group.payload)) == (bytes, len(payload) // 3)


def test_what_one_commit_made_safe_is_acknowledged_in_one_message_for_each_server():
    desk = Desk(groups_per_step=80)
    desk.join(A, capacity_groups=80)
    desk.join(B, capacity_groups=80)
    accepted = [AcceptGroup(server_id="ab"[number % 2], group=a_group(number)) for number in range(140)]
    desk.outbound.letters.clear()
    desk.outbound.acknowledge(accepted)
    told = [(letter.peer, letter.message.lease_ids) for letter in desk.outbound.letters]
    assert [(peer, len(lease_ids)) for peer, lease_ids in told] == [(A, 64), (A, 6), (B, 64), (B, 6)]
    assert {lease_id for peer, lease_ids in told if peer == A for lease_id in lease_ids} == {*range(0, 140, 2)}


def test_a_failed_lease_is_lent_again_and_a_leaving_servers_leases_go_to_another():
    desk = Desk()
    desk.join(A)
    [(_, again)] = desk.say(A, LeaseFailed(lease_id=1, kind="environment", reason="boom"))
    assert again.task_id == 1
    desk.join(B)
    leases = desk.say(A, Leaving(reason="SIGTERM"))
    assert {(peer, lease.task_id) for peer, lease in leases} == {(B, 0), (B, 1), (B, 2), (B, 3)}


def test_a_heartbeat_is_answered_by_a_pulse_that_says_what_the_server_waits_for():
    desk = Desk()
    desk.join()
    [(_, pulse)] = desk.say(A, a_heartbeat())
    assert pulse == Pulse(
        published_version=0,
        waiting_for="the learner to complete step 1: more data would be older than max_staleness",
    )


def test_a_server_that_lost_its_connection_keeps_its_leases_and_is_told_them_again():
    desk = Desk()
    before = [lease for _, lease in desk.join(A)]
    elsewhere = Peer(b"another connection", A.key)
    assert isinstance(desk.say(elsewhere, a_hello("a", epoch="epoch of a"))[0][1], Welcome)
    assert desk.say(elsewhere, a_ready()) == [(elsewhere, lease) for lease in before]
    assert (elsewhere, GroupsAccepted(lease_ids=(0,))) in desk.finish(elsewhere, before[0])
    [(peer, refused)] = desk.say(A, a_heartbeat())
    assert (peer, refused.retry) == (A, True)


def test_the_epoch_of_a_server_is_worth_nothing_under_another_key():
    desk = Desk()
    desk.join(A)
    thief = Peer(b"thief", "another key")
    desk.say(thief, a_hello("a", epoch="epoch of a"))
    assert desk.outbound.sessions.of_peer(thief).server_id == "a#2"
    assert desk.outbound.sessions.of_peer(A).server_id == "a"


def test_a_restarted_server_is_another_one():
    desk = Desk()
    [(_, lease), *_] = desk.join(A)
    reborn = Peer(b"a2", A.key)
    desk.say(reborn, a_hello("a", epoch="epoch after the restart"))
    desk.say(reborn, a_ready())
    assert list(desk.core.members) == ["a", "a#2"]
    [(_, refused)] = desk.finish(reborn, lease)
    assert refused.reason == "lease 0: it was never granted to this server"


def test_one_connection_speaks_for_one_server():
    desk = Desk()
    desk.join(A)
    [(_, refused)] = desk.say(A, a_hello("b", epoch="another"))
    assert refused.reason == "this connection speaks for server a already; open another one"


def test_a_silent_server_is_told_why_it_was_dropped_and_may_return():
    desk = Desk(server_timeout_s=10.0)
    desk.join(A, now=0.0)
    for second in range(1, 12):
        desk.inbound.tick(float(second))
    answers = [message for _, message in desk.answers()]
    assert [message.lease_id for message in answers[:4]] == [0, 1, 2, 3]
    assert isinstance(answers[0], LeaseCancelled)
    assert answers[4] == Refused(reason="not heard of for 11 s", retry=True)
    assert [lease.task_id for _, lease in desk.join(A, now=12.0)] == [0, 1, 2, 3]


def test_a_server_too_small_for_a_group_is_refused_for_good():
    [(_, refused)] = Desk().join(capacity_bytes=1)
    assert not refused.retry
    assert "one group may have 10000" in refused.reason


def test_a_server_that_never_gets_ready_is_forgotten_after_a_while():
    desk = Desk()
    desk.say(A, a_hello(), now=0.0)
    desk.inbound.tick(JOINING_TIMEOUT_S)
    assert len(desk.outbound.sessions) == 1
    desk.inbound.tick(JOINING_TIMEOUT_S + 1)
    assert len(desk.outbound.sessions) == 0


def test_garbage_is_answered_counted_and_after_repeats_its_key_is_not_listened_to_any_more():
    desk = Desk(max_offences=3)
    desk.join(A)
    for _ in range(3):
        desk.inbound.hear_garbage(A, "header: nonsense", 1.0)
    answers = [message for _, message in desk.answers()]
    assert answers[0] == Refused(reason="this cannot be read: header: nonsense", retry=True)
    assert answers[-1] == Refused(reason="quarantined: 3 offences without a good group, the last one: header: nonsense")
    assert desk.core.counts().refused == {"garbage": 3}
    assert desk.core.members == {}
    for peer in (A, Peer(b"elsewhere", A.key)):
        assert desk.say(peer, a_hello()) == []
        desk.inbound.hear_garbage(peer, "more", 2.0)
        assert desk.answers() == []
    assert desk.join(B) != []


def test_a_stranger_that_keeps_sending_garbage_is_not_listened_to_even_without_a_key():
    desk = Desk(max_offences=2)
    stranger, other = Peer(b"1", ""), Peer(b"2", "")
    for _ in range(2):
        desk.inbound.hear_garbage(stranger, "nonsense", 1.0)
    desk.answers()
    assert desk.say(stranger, a_hello()) == []
    assert desk.say(other, a_hello()) != []


def test_the_list_of_those_not_listened_to_is_bounded():
    desk = Desk()
    for number in range(MAX_BLOCKED + 1):
        desk.outbound.block(Peer(b"", str(number)))
    assert not desk.outbound.is_blocked(Peer(b"", "0"))
    assert desk.outbound.is_blocked(Peer(b"", "1"))


def test_everybody_is_told_that_the_run_is_over_and_late_comers_too():
    desk = Desk()
    desk.join(A)
    desk.say(B, a_hello("b", epoch="2"))
    desk.outbound.close("100 steps done")
    assert desk.answers() == [(A, Finished(reason="100 steps done")), (B, Finished(reason="100 steps done"))]
    [(_, finished)] = desk.say(Peer(b"c", ""), a_hello("c", epoch="3"))
    assert finished == Finished(reason="100 steps done")


def test_a_lease_that_ended_before_its_row_was_there_is_not_lent():
    desk = Desk()
    desk.say(A, a_hello(epoch="epoch of a"))
    desk.inbound.hear(A, a_ready(), b"", 0.0)
    desk.inbound.hear(A, Leaving(reason="SIGTERM"), b"", 0.0)
    assert desk.answers() == []


def test_the_status_shows_every_server_and_what_the_learner_waits_for():
    desk = Desk()
    desk.join(A, now=1.0)
    desk.say(A, a_heartbeat(generated_tokens=77), now=2.0)
    desk.say(B, a_hello("b\n", epoch="2"), now=3.0)
    status = status_of(
        desk.core, desk.outbound.sessions, TokenAges(), 4.0, listen_address="tcp://x", strangers={"malformed": 2}
    )
    assert [
        (one.server, one.running_groups, one.generated_tokens, one.silent_s, one.doing) for one in status.servers
    ] == [
        ("a", 4, 77, 2.0, "generating"),
        ("b?", 0, 0, 1.0, "loading the model"),
    ]
    assert (status.leased, status.running, status.queued, status.trained) == (4, 4, 0, 0)
    assert status.refused == {"malformed": 2}
    assert status.waiting_for == "server a: 4 groups running, lease 0 (task 0) since 3 s"


def test_a_lease_that_failed_before_its_row_was_there_is_not_lent():
    desk = Desk(groups_per_step=1, max_staleness=0)
    desk.say(A, a_hello(epoch="epoch of a"))
    desk.inbound.hear(A, a_ready(), b"", 0.0)
    desk.inbound.hear(A, LeaseFailed(lease_id=0, kind="engine", reason="dead"), b"", 0.0)
    assert [lease.lease_id for _, lease in desk.answers()] == [1]


def test_a_server_that_was_dropped_must_get_ready_anew():
    desk = Desk()
    desk.join(A)
    desk.say(A, Leaving(reason="pause"))
    desk.say(A, a_hello("a", epoch="epoch of a"))
    assert not desk.outbound.sessions.of_peer(A).ready


def test_the_number_of_sessions_is_bounded(monkeypatch):
    monkeypatch.setattr("learner.coordinator.sessions.MAX_SESSIONS", 1)
    desk = Desk()
    desk.join(A)
    [(_, refused)] = desk.say(B, a_hello("b", epoch="2"))
    assert refused == Refused(reason="1 servers have joined already; try again when one has left", retry=True)


def test_a_hello_that_arrives_late_over_a_connection_that_was_cut_does_not_take_the_session():
    desk = Desk()
    desk.say(A, a_hello("a", said_us=2))
    elsewhere = Peer(b"old connection", A.key)
    [(_, refused)] = desk.say(elsewhere, a_hello("a", said_us=1))
    assert refused.reason == "this connection is an old one: a later Hello of this server came over another"
    assert desk.outbound.sessions.of_peer(A).server_id == "a"
    assert isinstance(desk.say(elsewhere, a_hello("a", said_us=3))[0][1], Welcome)
    assert desk.outbound.sessions.of_peer(A) is None
