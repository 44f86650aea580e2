"""Coordinator: who does which task when, what is taken, and in which order it is trained.

A synchronous state machine without clock, randomness, lock or IO: events come in, with the time `now` in seconds,
and decisions go out. Everything here can be tested in a line and driven by a simulator.

Why no token that is too old is ever trained: see deadlines.py.
"""

from collections.abc import Sequence

from common.environments import ENVIRONMENT_UNAVAILABLE
from common.messages import EvaluatedEpisode
from common.snapshot import NO_VERSION
from learner.coordinator.decisions import (
    AcceptGroup,
    Decision,
    DeliverBatch,
    DropServer,
    FilterGroup,
    ForgetTrained,
    Quarantine,
    RefuseGroup,
)
from learner.coordinator.delivery import Delivery, LearnerError
from learner.coordinator.evaluations import Evaluations
from learner.coordinator.leases import LEASE_ID_LEAP, LeaseBook
from learner.coordinator.ledger import decode_frontier
from learner.coordinator.members import HungServers, Member, Members, Offences, OwnPauses
from learner.coordinator.records import Claim, Counts, count, grant_of
from learner.coordinator.recovery import JournalContents, recover
from learner.coordinator.replay_queue import FinishedGroup
from learner.coordinator.settings import CoordinatorSettings


class Coordinator:
    """The rules of one run, from `version` on.

    frontier: what frontier() said for the learner's last checkpoint, if there is one. journal: what was accepted since.
    published_version: what servers may have loaded by now.
    servers_return_until: it replaces a coordinator, whose leases servers may claim before any are granted.
    Raises ledger.FrontierError when they do not belong to this version and these data.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        version: int = 0,
        frontier: bytes = b"",
        journal: JournalContents | None = None,
        published_version: int = NO_VERSION,
        servers_return_until: float | None = None,
    ) -> None:
        self.settings = settings
        state = decode_frontier(frontier, version=version, source=settings.source)
        self.book = LeaseBook(settings, recover(state, journal or JournalContents(), version=version))
        self.book.published_version = published_version
        if servers_return_until is not None:
            self.book.next_lease_id += LEASE_ID_LEAP
        self.failures_in_a_row = 0  # at all servers together
        self.closed = ""
        self._servers_return_until = servers_return_until or 0.0
        self._delivery = Delivery(self.book.batches.recorded.get(version, ()))
        self._joined = 0
        self._own_pauses = OwnPauses()
        self._offences = Offences(settings.max_offences)
        self._hung = HungServers()
        self.evaluations = Evaluations(settings, self.book.members)

    @property
    def version(self) -> int:
        """Number of completed optimizer steps."""
        return self.book.version

    @property
    def members(self) -> Members:
        return self.book.members

    # --- servers ---------------------------------------------------------------------------------------------------

    def server_ready(
        self, server_id: str, *, capacity_groups: int, capacity_bytes: int, claims: Sequence[Claim] = (), now: float
    ) -> list[Decision]:
        """A server joins. One that is a member already was cut off: its open leases are told to it again.

        claims: leases that it proved to hold, in case this coordinator does not know them any more.
        """
        if capacity_bytes < self.settings.max_group_bytes:
            reason = (
                f"the server takes {capacity_bytes} bytes of unfinished groups, but one group may have "
                f"{self.settings.max_group_bytes}; raise the server's capacity, or lower max_new_tokens or group_size"
            )
            return [DropServer(server_id=server_id, reason=reason, may_return=False)]
        member = self.members.get(server_id)
        is_new = member is None
        if member is None:
            self._joined += 1
            member = Member(
                server_id=server_id,
                joined=self._joined,
                capacity_groups=capacity_groups,
                capacity_bytes=capacity_bytes,
                heard_at=now,
                progressed_at=now,
            )
        self.members.add(member)
        member.capacity_groups, member.capacity_bytes, member.heard_at = capacity_groups, capacity_bytes, now
        if is_new:
            if server_id in self._hung:  # others first, and one lease at a time, until it has finished one
                member.failures_in_a_row = self.settings.failures_before_pause
            adopted = self.book.adopt(member, claims, now)
            return [*adopted, *self.evaluations.joined(server_id), *self._go_on(now)]
        again = [grant_of(self.book.running[lease_id]) for lease_id in member.leases]
        return [*again, *self.evaluations.joined(server_id), *self._go_on(now)]

    def heartbeat(
        self,
        server_id: str,
        *,
        progress: int,
        loaded_version: int,
        now: float,
        out_of_service: str = "",
        holding: int = NO_VERSION,
    ) -> list[Decision]:
        """A sign of life from the server's work loop. From servers that are no members nothing is heard.

        holding: the version that it stays at for an evaluation.
        out_of_service: why nothing the server samples may be used. It is granted nothing more until that is over, and
        what it has not finished goes to others.
        """
        member = self.members.get(server_id)
        if member is None:
            return []
        member.heard_at = now
        if progress > member.progress:
            member.progressed_at = now
        member.progress, member.loaded_version = progress, loaded_version
        member.out_of_service, member.holding = out_of_service, holding
        if out_of_service:
            self.evaluations.left(server_id)
            for lease in [self.book.running[lease_id] for lease_id in member.leases]:
                self.book.fail(lease, "out_of_service", out_of_service, blame_task=False)
            return self._go_on(now)
        return self._grant(now)  # no lease has ended: no batch can have become complete

    def server_left(self, server_id: str, reason: str, now: float) -> list[Decision]:
        """The server says goodbye: its leases go to others at once."""
        return [*self._remove(server_id, "server_left", f"the server left: {reason}"), *self._go_on(now)]

    def server_lost(self, server_id: str, reason: str, now: float) -> list[Decision]:
        """The server is gone or hangs: its leases expire, once, and go to others."""
        member = self.members.get(server_id)
        if member is None:
            return []
        self.evaluations.left(server_id)
        expired = self.book.expire_all(member, reason)
        self.members.remove(member)
        return [*expired, DropServer(server_id=server_id, reason=reason), *self._go_on(now)]

    def garbage(self, server_id: str, what: str, now: float) -> list[Decision]:
        """A peer, member or not, sent what cannot be read."""
        count(self.book.endings.refused, "garbage")
        return self.offence(server_id, what, now)

    def offence(self, server_id: str, what: str, now: float) -> list[Decision]:
        """A peer, member or not, did what no correct server does."""
        if not self._offences.note(server_id):
            return []
        reason = f"{self.settings.max_offences} offences without a good group, the last one: {what}"
        removed = self._remove(server_id, "quarantined", reason)
        return [Quarantine(server_id=server_id, reason=reason), *removed, *self._go_on(now)]

    def tick(self, now: float) -> list[Decision]:
        """Time has passed; call about once a second, after everything that had arrived was handled."""
        own_pause_s = self._own_pauses.since_last_tick(self.settings, now)
        decisions: list[Decision] = []
        for member in list(self.members.values()):
            member.forgive(own_pause_s, now)
            if not member.has_work(self.book.published_version):
                member.progressed_at = now
            if reason := member.loss(self.settings, now):
                if not member.is_silent(self.settings, now):
                    self._hung.note(member.server_id)
                decisions += self.server_lost(member.server_id, reason, now)
        return [*decisions, *self._go_on(now)]

    # --- groups ----------------------------------------------------------------------------------------------------

    def group_finished(self, server_id: str, group: FinishedGroup, now: float) -> list[Decision]:
        """A server fulfilled a lease; the group's bytes were validated before."""
        lease = self.book.lease_of(server_id, group.lease_id)
        if lease is None:
            return self.refuse_group(server_id, group.lease_id, now)
        fault = self.book.fault(lease, group)
        if fault is not None:
            return self.group_invalid(server_id, group.lease_id, *fault, now)
        is_queued = self.book.accept(lease, group)
        self.members[server_id].heard_at = now
        self.members[server_id].note_success()
        self._offences.clear(server_id)
        self._hung.forgive(server_id)
        self.failures_in_a_row = 0
        taken: Decision = AcceptGroup(server_id=server_id, group=group)
        if not is_queued:
            taken = FilterGroup(
                server_id=server_id, lease_id=group.lease_id, task_id=group.task_id, version=self.version
            )
        return [taken, *self._go_on(now)]

    def group_invalid(self, server_id: str, lease_id: int, kind: str, reason: str, now: float) -> list[Decision]:
        """What came for the lease cannot be used: the lease has failed, and the server is blamed for it."""
        if self.book.lease_of(server_id, lease_id) is None:
            return self.refuse_group(server_id, lease_id, now)
        count(self.book.endings.refused, kind)
        refused = RefuseGroup(server_id=server_id, lease_id=lease_id, kind=kind, reason=reason)
        failed = self.lease_failed(server_id, lease_id, kind, reason, now)
        return [refused, *failed, *self.offence(server_id, reason, now)]

    def refuse_group(self, server_id: str, lease_id: int, now: float) -> list[Decision]:
        """A group came for a lease that is not running at this server."""
        kind, reason = self.book.why_not_running(lease_id)
        offence = f"a group for lease {lease_id}, which it was never granted" if kind == "not_yours" else ""
        count(self.book.endings.refused, kind)
        if kind == "ended":
            self.book.endings.note_refused(lease_id)
        refused = RefuseGroup(server_id=server_id, lease_id=lease_id, kind=kind, reason=f"lease {lease_id}: {reason}")
        # A server that is no member yet may hold leases of a coordinator before this one: that is no offence.
        blamed = offence and server_id in self.members
        return [refused, *(self.offence(server_id, offence, now) if blamed else [])]

    def lease_failed(self, server_id: str, lease_id: int, kind: str, reason: str, now: float) -> list[Decision]:
        """The server could not fulfil the lease: its task is leased again, until it has failed too often."""
        lease = self.book.lease_of(server_id, lease_id)
        if lease is None:
            return []
        self.members[server_id].heard_at = now
        if kind == ENVIRONMENT_UNAVAILABLE:
            self.book.fail_unavailable(lease, kind, reason, now)
            return self._go_on(now)
        limit = self.settings.failures_before_pause
        self.failures_in_a_row += 1
        # While nothing succeeds anywhere it is not the task's fault: an environment that is down must not use up the
        # attempts of the whole data set.
        parked = self.book.fail(lease, kind, reason, blame_task=self.failures_in_a_row <= limit)
        self.members[server_id].note_failure(f"{kind}: {reason}", failures_before_pause=limit, now=now)
        return [*parked, *self._go_on(now)]

    # --- evaluations -----------------------------------------------------------------------------------------------

    def evaluate(self, version: int, now: float) -> list[Decision]:
        """The learner wants an evaluation of `version`, or of a later one when servers never have that one alone."""
        if self.settings.evaluation is None:
            raise LearnerError(f"an evaluation of version {version} is asked for in a run that has none")
        return [*self.evaluations.ask(version, now), *self._go_on(now)]

    def evaluation_finished(
        self,
        server_id: str,
        evaluation_id: int,
        *,
        task_id: int,
        version: int,
        episodes: Sequence[EvaluatedEpisode],
        now: float,
    ) -> list[Decision]:
        """A server did an evaluation task. What is wrong with it is the server's fault."""
        fault = self.evaluations.finished(server_id, evaluation_id, task_id=task_id, version=version, episodes=episodes)
        return [*(self.offence(server_id, fault, now) if fault else []), *self._go_on(now)]

    def evaluation_failed(self, server_id: str, evaluation_id: int, kind: str, now: float) -> list[Decision]:
        self.evaluations.failed(server_id, evaluation_id, kind)
        return self._go_on(now)

    # --- the learner -----------------------------------------------------------------------------------------------

    def take_batch(self, version: int, now: float) -> list[Decision]:
        """The learner can train `version` now: its batch is delivered when complete. Asked again, told again."""
        if version != self.version:
            raise LearnerError(f"the learner asks for the batch of version {version}, the run is at {self.version}")
        self._delivery.want(version, now)
        return self._go_on(now)

    def step_completed(self, version: int, lease_ids: tuple[int, ...], now: float) -> list[Decision]:
        """The optimizer step is done: the batch's credits come back, and the run is at `version`."""
        if version != self.version + 1 or not lease_ids or lease_ids != self._delivery.lease_ids:
            raise LearnerError(
                f"the learner completed version {version} with leases {lease_ids}; the run is at {self.version} and "
                f"delivered leases {self._delivery.lease_ids}"
            )
        self.book.consume(lease_ids)
        self._delivery.complete()
        return self._go_on(now)

    def published(self, version: int, now: float) -> list[Decision]:
        """Snapshot `version` can be pulled."""
        before = self.book.published_version
        if not before <= version <= self.version:
            raise LearnerError(f"snapshot {version} was published, after {before}; the run is at {self.version}")
        for member in self.members.values():
            if not member.has_work(before):
                member.progressed_at = now  # what it may have waited for is there only now
        self.book.published_version = version
        return self._go_on(now)

    def checkpointed(self, version: int) -> list[Decision]:
        """A checkpoint at `version` is safe, with the frontier of that version."""
        if version > self.version:
            raise LearnerError(f"the learner has a checkpoint of version {version}, the run is at {self.version}")
        return [ForgetTrained(version=version)]

    def frontier(self) -> bytes:
        """What a checkpoint at self.version must hold: no prompt is skipped, none repeated in what gets trained."""
        return self.book.frontier()

    def close(self, reason: str) -> list[Decision]:
        """The run is over: running leases are cancelled and none are granted any more."""
        self.closed = reason
        return [decision for name in list(self.members) for decision in self._remove(name, "run_closed", reason)]

    def _go_on(self, now: float) -> list[Decision]:
        """What has become possible: a complete batch is delivered, then credits that came back are used."""
        decisions: list[Decision] = []
        if self._delivery.wanted_version is not None:
            if self.settings.stale_action == "requeue":
                decisions += self.book.cancel_late()
            decisions += self._deliver(now)
        return [*decisions, *self._grant(now)]

    def _grant(self, now: float) -> list[Decision]:
        """Leases to servers with room, as far as the bounds allow."""
        decisions: list[Decision] = []
        room = self.book.bounds.room
        if room and now >= self._servers_return_until and not self.closed:
            free = self.members.free(now)
            while free and len(decisions) < room:
                member = free.take()
                grant = self.book.grant(member, now)
                if grant is not None:
                    decisions.append(grant)
                    free.put_back(member)
        return decisions if self.closed else [*decisions, *self.evaluations.go_on(self.book.published_version, now)]

    def _deliver(self, now: float) -> list[Decision]:
        batch = self.book.batch()
        if not batch:
            return []
        self.book.batches.deliver(self.version, batch)
        idle_share = self._delivery.deliver(batch, now)
        if idle_share is not None:
            self.book.bounds.depth.batch_delivered(idle_share=idle_share, spare=len(self.book.queue) - len(batch))
        return [DeliverBatch(version=self.version, groups=batch)]

    def hold(self) -> str:
        """What keeps leases from being granted to anybody, for people; empty when nothing does."""
        return f"nothing: the run is over, {self.closed}" if self.closed else self.book.bounds.hold(self.version)

    def _remove(self, server_id: str, kind: str, reason: str) -> list[Decision]:
        """Cancel the server's leases and drop it."""
        member = self.members.get(server_id)
        if member is None:
            return []
        self.evaluations.left(server_id)
        cancelled = self.book.cancel_all(member, kind, reason)
        self.members.remove(member)
        return [*cancelled, DropServer(server_id=server_id, reason=reason)]

    def counts(self) -> Counts:
        return self.book.counts()

    def __repr__(self) -> str:
        hold = self.hold()
        return (
            f"<Coordinator version {self.version}, {len(self.members)} servers, {len(self.book.running)} running, "
            f"{self.book.queue!r}, {self.book.tasks!r}{', waits for ' + hold if hold else ''}>"
        )
