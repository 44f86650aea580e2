"""ObservedOutbound: the coordinator's way out, with a witness who notes decisions and promises in the history."""

from collections import defaultdict, deque
from typing import TYPE_CHECKING

from common.messages import CoordinatorToServer, GroupHeader, GroupRefused, GroupsAccepted, HeldLease
from learner.coordinator.decisions import (
    AcceptGroup,
    CancelLease,
    Decision,
    DropServer,
    FilterGroup,
    GrantEvaluation,
    GrantLease,
    ParkTask,
    Quarantine,
    RefuseGroup,
)
from learner.coordinator.outbound import Outbound
from tests.simulation import history as seen
from tests.simulation.account import NO_FAULT
from tests.simulation.groups import nonces_of, nonces_together

if TYPE_CHECKING:
    from tests.simulation.coordinator import SimulatedCoordinator


class ObservedOutbound(Outbound):
    """Notes, and then does what Outbound does."""

    def __init__(self, coordinator: "SimulatedCoordinator") -> None:
        world = coordinator.world
        super().__init__(world.service_settings, coordinator.core)
        self._coordinator = coordinator
        self._clock = world.clock
        self._note = world.note
        self._life = coordinator.life
        self._heard_at: dict[str, float] = {}
        self._judging: defaultdict[int, deque[int]] = defaultdict(deque)  # nonces of the groups of a message, by lease
        self._claimed: tuple[str, tuple[HeldLease, ...]] = ("", ())

    def carry_out(self, decisions: list[Decision]) -> None:
        self._witness_adoptions(decisions)
        for decision in decisions:
            self._witness(decision)
        super().carry_out(decisions)
        if decisions:
            self.observe()

    def say_to(self, server_id: str, message: CoordinatorToServer) -> None:
        if isinstance(message, GroupsAccepted):
            for lease_id in message.lease_ids:
                self._note(seen.Answered(self._clock.now, self._life, server_id, lease_id, True))
        elif isinstance(message, GroupRefused):
            self._note(seen.Answered(self._clock.now, self._life, server_id, message.lease_id, False))
        super().say_to(server_id, message)

    def heard(self, server: str) -> None:
        """The server gave a sign of life."""
        self._heard_at[server] = self._coordinator.running_s()

    def note_claims(self, server: str, held: tuple[HeldLease, ...]) -> None:
        """The server says what it holds; whether the coordinator believes it shows in what it decides next."""
        new = tuple(one for one in held if self.core.book.lease_of(server, one.lease_id) is None)
        self._claimed = (server, new)

    def note_groups(self, headers: tuple[GroupHeader, ...], payload: bytes) -> None:
        """These groups are judged next: each is accepted, filtered or refused, in their order."""
        self._judging.clear()
        for header, nonce in zip(headers, nonces_together(headers, payload), strict=True):
            self._judging[header.lease_id].append(nonce)

    def note_delivered(self, version: int, headers: tuple[GroupHeader, ...], payload: bytes) -> None:
        leases = tuple(header.lease_id for header in headers)
        tasks = tuple(header.task_id for header in headers)
        nonces = nonces_of(headers, payload)
        self._note(seen.Delivered(self._clock.now, self._life, version, leases, tasks, nonces))

    def observe(self) -> None:
        """What an operator sees."""
        counts, book = self.core.counts(), self.core.book
        ended = sum(counts.failed.values()) + sum(counts.cancelled.values()) + counts.expired
        self._note(
            seen.Observed(
                self._clock.now, self._life, self.core.version, counts.leased, counts.running, counts.queued,
                counts.trained, ended, counts.balanced, book.queue.num_bytes,
            )
        )  # fmt: skip

    def _witness_adoptions(self, decisions: list[Decision]) -> None:
        (server, held), self._claimed = self._claimed, ("", ())
        granted = {decision.lease_id for decision in decisions if isinstance(decision, GrantLease)}
        for lease_id in dict.fromkeys(one.lease_id for one in held):
            lease = self.core.book.lease_of(server, lease_id)
            if lease is not None and lease_id not in granted:
                now, life = self._clock.now, self._life
                self._note(seen.Adopted(now, life, server, lease.lease_id, lease.task_id, lease.min_version))

    def _witness(self, decision: Decision) -> None:
        now, life = self._clock.now, self._life
        match decision:
            case GrantLease(server_id=server, lease_id=lease, task_id=task, min_version=min_version):
                silent_s, at_version = self._silent_s(server), self.core.version
                key = self._key_of(server)
                self._note(seen.Granted(now, life, server, key, lease, task, min_version, at_version, silent_s))
            case GrantEvaluation(server_id=server, evaluation_id=evaluation, task_id=task, version=version):
                silent_s = self._silent_s(server)
                self._note(seen.EvaluationGranted(now, life, server, evaluation, task, version, silent_s))
            case AcceptGroup(server_id=server, group=group):
                self.heard(server)
                nonce = self._judging[group.lease_id].popleft()
                at_version = self.core.version
                self._note(seen.Accepted(now, life, server, group.lease_id, group.task_id, nonce, at_version))
            case FilterGroup(server_id=server, lease_id=lease, task_id=task):
                self.heard(server)
                self._note(
                    seen.Filtered(now, life, server, lease, task, self._judging[lease].popleft(), self.core.version)
                )
            case RefuseGroup(server_id=server, lease_id=lease, kind=kind):
                if kind not in NO_FAULT:
                    self.heard(server)
                self._note(seen.Refused(now, life, server, lease, self._judging[lease].popleft(), kind))
            case CancelLease(server_id=server, lease_id=lease, reason=reason):
                self._note(seen.Cancelled(now, life, server, lease, reason))
            case DropServer(server_id=server, reason=reason):
                self._note(seen.Dropped(now, life, server, reason, self._silent_s(server)))
            case Quarantine(server_id=server):
                self._note(seen.Quarantined(now, life, server, self._key_of(server)))
            case ParkTask(task_id=task):
                self._note(seen.Parked(now, life, task))

    def _silent_s(self, server: str) -> float:
        return self._coordinator.running_s() - self._heard_at.get(server, 0.0)

    def _key_of(self, server: str) -> str:
        session = self.sessions.of_server(server)
        return session.peer.key if session is not None else ""
