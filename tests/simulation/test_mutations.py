"""The simulator against broken rules: each guard of the coordinator is taken out, and a history must show it.

A mutation that no history shows is a guard that nobody would miss. Each is found within MAX_SEEDS histories.
"""

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest

from common.together import split_payload
from learner.coordinator import core as core_module
from learner.coordinator import dynamic_sampling, evaluations, records
from learner.coordinator.admission import Admission
from learner.coordinator.batches import Batches
from learner.coordinator.bounds import Bounds
from learner.coordinator.core import Coordinator
from learner.coordinator.deadlines import Deadlines
from learner.coordinator.decisions import AcceptGroup, FilterGroup, ForgetTrained, RefuseGroup
from learner.coordinator.dynamic_sampling import DynamicSampling
from learner.coordinator.journal_keeper import JournalKeeper
from learner.coordinator.leases import LeaseBook
from learner.coordinator.ledger import TaskLedger
from learner.coordinator.members import Member
from learner.coordinator.outbound import Outbound
from learner.coordinator.proofs import LeaseProofs
from learner.coordinator.recovery import JournalContents
from learner.coordinator.replay_queue import ReplayQueue
from tests.simulation.campaign import examine

MAX_SEEDS = 1000
FAR = 1 << 30
MUTATIONS = {}
NAMES: list[str] = []  # pytest reads them after the module is run


def mutation(change):
    """A way to break the coordinator; its name says what is missing then."""
    MUTATIONS[change.__name__] = change
    return change


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_a_history_shows_what_is_missing(name, monkeypatch):
    MUTATIONS[name](monkeypatch)
    assert any(examine(seed)[1] is not None for seed in range(MAX_SEEDS))


# --- admission


def with_fault(monkeypatch, change):
    """Admission judges what change(book, lease, group) returns."""
    fault = LeaseBook.fault
    monkeypatch.setattr(LeaseBook, "fault", lambda self, lease, group: fault(*change(self, lease, group)))


@mutation
def tokens_older_than_the_lease_allows_are_taken(monkeypatch):
    with_fault(monkeypatch, lambda book, lease, group: (book, replace(lease, min_version=0), group))


@mutation
def groups_of_another_task_are_taken(monkeypatch):
    with_fault(monkeypatch, lambda book, lease, group: (book, replace(lease, task_id=group.task_id), group))


@mutation
def tokens_from_the_future_are_taken(monkeypatch):
    def believe(book, lease, group):
        member = book.members[lease.server_id]
        return (
            SimpleNamespace(members={member.server_id: member}, settings=book.settings, published_version=FAR),
            lease,
            group,
        )

    with_fault(monkeypatch, believe)


@mutation
def tokens_of_a_version_the_server_never_had_are_taken(monkeypatch):
    def believe(book, lease, group):
        members = {lease.server_id: replace(book.members[lease.server_id], loaded_version=FAR)}
        return (
            SimpleNamespace(members=members, settings=book.settings, published_version=book.published_version),
            lease,
            group,
        )

    with_fault(monkeypatch, believe)


@mutation
def groups_larger_than_their_lease_pays_for_are_taken(monkeypatch):
    def generous(book, lease, group):
        settings = replace(book.settings, max_group_bytes=book.settings.max_group_bytes * 2, queue_bytes=1 << 30)
        return (
            SimpleNamespace(members=book.members, settings=settings, published_version=book.published_version),
            lease,
            group,
        )

    with_fault(monkeypatch, generous)


@mutation
def of_groups_that_come_together_only_the_first_is_looked_at(monkeypatch):
    check = Admission._check

    def hasty(self, headers, payload, newest_version):
        check(self, headers[:1], split_payload(headers, payload)[0], newest_version)

    monkeypatch.setattr(Admission, "_check", hasty)


@mutation
def anybody_may_fulfil_a_lease(monkeypatch):
    def lease_of(self, server_id, lease_id):
        return self.running.get(lease_id)

    monkeypatch.setattr(LeaseBook, "lease_of", lease_of)


@mutation
def a_lease_goes_on_after_its_group_was_accepted(monkeypatch):
    def accept(self, lease, group):
        self.endings.note_accepted(lease.lease_id)
        self.batches.put(group)
        return True

    monkeypatch.setattr(LeaseBook, "accept", accept)


# --- dynamic sampling


@mutation
def groups_that_teach_something_are_filtered(monkeypatch):
    monkeypatch.setattr(dynamic_sampling, "has_equal_rewards", lambda header: True)


@mutation
def filtering_has_no_bound(monkeypatch):
    monkeypatch.setattr(DynamicSampling, "_num_filtered", lambda self, version: 0)


@mutation
def filtered_groups_are_acknowledged_before_the_journal_knows(monkeypatch):
    record = Outbound._record

    def hasty(self, decision):
        record(self, decision)
        if isinstance(decision, FilterGroup):
            self.acknowledge([decision])

    monkeypatch.setattr(Outbound, "_record", hasty)


@mutation
def filtered_tasks_are_sampled_again_after_a_crash(monkeypatch):
    contents = JournalKeeper.contents

    async def forgetful(self, frontier, *, is_new_run):
        return replace(await contents(self, frontier, is_new_run=is_new_run), filtered={})

    monkeypatch.setattr(JournalKeeper, "contents", forgetful)


@mutation
def a_checkpoint_says_that_a_task_is_done_before_the_journal_knows(monkeypatch):
    monkeypatch.setattr(DynamicSampling, "task_ids", lambda self: ())


@mutation
def filtered_tasks_are_leased_again(monkeypatch):
    monkeypatch.setattr(TaskLedger, "done", lambda self, task_id: self.give_back(task_id))


# --- leases and credits --------------------------------------------------------------------------------------------


@mutation
def credits_of_a_server_do_not_come_back(monkeypatch):
    def close(self, lease):
        del self.running[lease.lease_id]
        self.batches.deadlines.remove(lease.deadline)

    monkeypatch.setattr(LeaseBook, "_close", close)


@mutation
def bytes_of_trained_groups_do_not_come_back(monkeypatch):
    consume = ReplayQueue.consume

    def leaky(self, lease_ids):
        before = self.num_bytes
        consumed = consume(self, lease_ids)
        self.num_bytes = before
        return consumed

    monkeypatch.setattr(ReplayQueue, "consume", leaky)


@mutation
def tasks_of_a_lost_server_are_forgotten(monkeypatch):
    monkeypatch.setattr(TaskLedger, "lost", lambda self, task_id, reason: False)


@mutation
def tasks_of_a_server_that_left_are_forgotten(monkeypatch):
    monkeypatch.setattr(TaskLedger, "give_back", lambda self, task_id: None)


@mutation
def tasks_that_fail_while_everything_fails_are_forgotten(monkeypatch):
    monkeypatch.setattr(TaskLedger, "postpone", lambda self, task_id: None)


@mutation
def failed_tasks_are_parked_at_once(monkeypatch):
    failed = TaskLedger.failed

    def impatient(self, task_id, reason):
        self.max_failures = 1
        return failed(self, task_id, reason)

    monkeypatch.setattr(TaskLedger, "failed", impatient)


@mutation
def new_tasks_come_before_those_given_back(monkeypatch):
    def next_task(self, may_run):
        self.next_task_id += 1
        return self.next_task_id - 1

    monkeypatch.setattr(TaskLedger, "next", next_task)


def without_bound(monkeypatch, **changes):
    """Granting goes by other settings than the rest."""

    def generous(rule):
        def generous_rule(self):
            true, self._settings = self._settings, replace(self._settings, **changes)
            try:
                return rule(self)
            finally:
                self._settings = true

        return generous_rule

    monkeypatch.setattr(Bounds, "held_by", generous(Bounds.held_by))
    monkeypatch.setattr(Bounds, "room", property(generous(Bounds.room.fget)))


@mutation
def the_queue_has_no_bound_in_groups(monkeypatch):
    without_bound(monkeypatch, queue_groups=1 << 20)
    monkeypatch.setattr(ReplayQueue, "put", ReplayQueue.put_back)
    monkeypatch.setattr("learner.coordinator.leases.min", max, raising=False)


@mutation
def the_queue_has_no_bound_in_bytes(monkeypatch):
    without_bound(monkeypatch, queue_bytes=1 << 30)
    monkeypatch.setattr(ReplayQueue, "put", ReplayQueue.put_back)


@mutation
def a_server_may_have_more_leases_than_it_takes(monkeypatch):
    monkeypatch.setattr(Member, "free_groups", lambda self, settings, now: 1)


@mutation
def servers_that_are_silent_are_granted_leases(monkeypatch):
    free_groups = Member.free_groups
    monkeypatch.setattr(
        Member, "free_groups", lambda self, settings, now: free_groups(self, settings, min(now, self.heard_at))
    )


@mutation
def a_lease_is_counted_twice(monkeypatch):
    note = records.Endings.note_expired

    def twice(self, lease):
        note(self, lease)
        self.expired += 1

    monkeypatch.setattr(records.Endings, "note_expired", twice)


# --- order and staleness -------------------------------------------------------------------------------------------


@mutation
def the_youngest_groups_are_trained_first(monkeypatch):
    def youngest(self, num_groups):
        return tuple(self._groups[lease_id] for _, lease_id in self._order[::-1][:num_groups])

    monkeypatch.setattr(ReplayQueue, "oldest", youngest)


@mutation
def batches_are_in_the_order_of_arrival(monkeypatch):
    batch = Batches.next
    monkeypatch.setattr(Batches, "next", lambda self, version: batch(self, version)[::-1])


@mutation
def nothing_is_waited_for(monkeypatch):
    monkeypatch.setattr(Batches, "late_after", lambda self, version: None)


@mutation
def a_lease_may_use_any_version(monkeypatch):
    grant = LeaseBook.grant

    def lenient(self, member, now):
        granted = grant(self, member, now)
        lease = self.running[granted.lease_id]
        self.running[granted.lease_id] = replace(lease, min_version=0)
        return replace(granted, min_version=0)

    monkeypatch.setattr(LeaseBook, "grant", lenient)


@mutation
def slow_groups_are_given_up_without_end(monkeypatch):
    monkeypatch.setattr(TaskLedger, "requeues", lambda self, task_id: 0)


@mutation
def leases_are_adopted_that_come_too_late(monkeypatch):
    monkeypatch.setattr(Batches, "would_fit", lambda self, deadline, version: True)


@mutation
def leases_are_adopted_beside_a_batch_that_is_full(monkeypatch):
    monkeypatch.setattr(Batches, "deliver", lambda self, version, batch: None)


@mutation
def deadlines_are_a_step_too_late(monkeypatch):
    overfull = Deadlines.first_overfull
    monkeypatch.setattr(
        Deadlines, "first_overfull", lambda self, version, *, trained: overfull(self, version - 1, trained=trained)
    )


# --- crashes -------------------------------------------------------------------------------------------------------


@mutation
def groups_are_acknowledged_before_the_journal_has_them(monkeypatch):
    record = Outbound._record

    def hasty(self, decision):
        if isinstance(decision, AcceptGroup):
            self.acknowledge([decision])
        record(self, decision)

    monkeypatch.setattr(Outbound, "_record", hasty)


@mutation
def duplicates_are_answered_before_the_journal_has_the_first(monkeypatch):
    answer = Outbound._answer

    def hasty(self, decision):
        if isinstance(decision, RefuseGroup):
            self._refuse(decision)
        else:
            answer(self, decision)

    monkeypatch.setattr(Outbound, "_answer", hasty)


def with_frontier(monkeypatch, change):
    encode = LeaseBook.frontier

    def frontier(self):
        return msgspec.json.encode(change(self, msgspec.json.decode(encode(self))))

    monkeypatch.setattr(LeaseBook, "frontier", frontier)


@mutation
def checkpoints_forget_what_is_open(monkeypatch):
    with_frontier(monkeypatch, lambda book, state: state | {"open_tasks": []})


@mutation
def checkpoints_forget_what_is_queued(monkeypatch):
    def forget(book, state):
        queued = book.queue.task_ids()
        return state | {"open_tasks": [task for task in state["open_tasks"] if task[0] not in queued]}

    with_frontier(monkeypatch, forget)


@mutation
def checkpoints_forget_what_is_parked(monkeypatch):
    with_frontier(monkeypatch, lambda book, state: state | {"parked": {}})


def with_contents(monkeypatch, change):
    contents = JournalKeeper.contents

    async def changed(self, frontier, *, is_new_run):
        return change(await contents(self, frontier, is_new_run=is_new_run))

    monkeypatch.setattr(JournalKeeper, "contents", changed)


@mutation
def a_restart_does_not_read_the_journal(monkeypatch):
    with_contents(monkeypatch, lambda contents: JournalContents(past=contents.past))


@mutation
def a_restart_forgets_which_batches_were_delivered(monkeypatch):
    def forget(contents):
        return replace(contents, groups=[replace(group, batch_version=None) for group in contents.groups])

    with_contents(monkeypatch, forget)


@mutation
def a_restart_leases_accepted_tasks_again(monkeypatch):
    recover = core_module.recover

    def forgetful(frontier, journal, *, version):
        return replace(recover(frontier, journal, version=version), tasks=frontier)

    monkeypatch.setattr(core_module, "recover", forgetful)


@mutation
def a_checkpoint_makes_the_journal_forget_too_much(monkeypatch):
    monkeypatch.setattr(Coordinator, "checkpointed", lambda self, version: [ForgetTrained(version=version + 1)])


@mutation
def lease_ids_begin_again_after_a_restart(monkeypatch):
    monkeypatch.setattr(core_module, "LEASE_ID_LEAP", 0)


@mutation
def claims_need_no_proof(monkeypatch):
    monkeypatch.setattr(LeaseProofs, "holds", lambda self, held, holder: True)


@mutation
def fulfilled_leases_may_be_claimed_again(monkeypatch):
    monkeypatch.setattr(records.Endings, "may_go_on", lambda self, lease_id: True)
    monkeypatch.setattr(TaskLedger, "claim", lambda self, task_id, *, at_most_ahead: True)


# --- servers -------------------------------------------------------------------------------------------------------


@mutation
def the_quarantined_are_heard(monkeypatch):
    monkeypatch.setattr(Outbound, "block", lambda self, peer: None)


@mutation
def silent_servers_are_never_lost(monkeypatch):
    monkeypatch.setattr(Member, "loss", lambda self, settings, now: "")


@mutation
def servers_that_hang_are_never_lost(monkeypatch):
    loss = Member.loss

    def patient(self, settings, now):
        reason = loss(self, settings, now)
        return "" if reason.startswith("alive") else reason

    monkeypatch.setattr(Member, "loss", patient)


@mutation
def a_pause_of_the_coordinator_is_the_servers_fault(monkeypatch):
    monkeypatch.setattr(Member, "forgive", lambda self, pause_s, now: None)


@mutation
def a_second_of_silence_is_a_death(monkeypatch):
    loss = Member.loss
    monkeypatch.setattr(
        Member, "loss", lambda self, settings, now: loss(self, replace(settings, server_timeout_s=1.2), now)
    )


# --- evaluations ---------------------------------------------------------------------------------------------------


@mutation
def an_evaluation_keeps_what_another_version_did(monkeypatch):
    def keep(self):
        self.version = -1

    def begin(self, version, num_tasks, now):
        self.version, self.waiting_since = version, now
        self.pending = evaluations.deque(task for task in range(num_tasks) if task not in self.results)

    monkeypatch.setattr(evaluations._Evaluation, "drop", keep)
    monkeypatch.setattr(evaluations._Evaluation, "begin", begin)


@mutation
def an_evaluation_takes_whole_servers(monkeypatch):
    monkeypatch.setattr(evaluations.Evaluations, "_fits", lambda self, member, tasks, *, is_urgent: tasks < 9)


@mutation
def an_evaluation_waits_for_servers_for_ever(monkeypatch):
    go_on = evaluations.Evaluations.go_on
    monkeypatch.setattr(evaluations.Evaluations, "go_on", lambda self, published, now: go_on(self, published, 0.0))


@mutation
def silent_servers_evaluate(monkeypatch):
    monkeypatch.setattr(evaluations.Evaluations, "_is_usable", lambda self, member, now: True)


NAMES.extend(MUTATIONS)
