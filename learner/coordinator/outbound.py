"""Outbound: the core's decisions become messages to rollout servers. No socket, no clock, no waiting."""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from common.messages import (
    CoordinatorToServer,
    Evaluate,
    Finished,
    GroupRefused,
    GroupsAccepted,
    HoldVersions,
    Lease,
    LeaseCancelled,
    Leases,
    Pulse,
    Refused,
)
from common.together import in_messages
from common.wire import Peer
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import (
    AcceptGroup,
    CancelLease,
    Decision,
    DeliverBatch,
    DropServer,
    FilterGroup,
    ForgetTrained,
    GrantEvaluation,
    GrantLease,
    HoldFor,
    ParkTask,
    Quarantine,
    RefuseGroup,
    ReportEvaluation,
)
from learner.coordinator.explain import what_a_server_waits_for
from learner.coordinator.journal import BatchRecord, FilteredRecord, ForgetRecord, ParkedRecord, Record
from learner.coordinator.messages import EvaluatedTask, EvaluationReport
from learner.coordinator.proofs import LeaseProofs
from learner.coordinator.service_settings import ServiceSettings
from learner.coordinator.sessions import Session, Sessions
from learner.coordinator.tasks import Task

logger = logging.getLogger(__name__)

Promise = AcceptGroup | FilterGroup | DeliverBatch | RefuseGroup

MAX_BLOCKED = 1 << 12
MAX_TEXT = 2000
MAX_ID_BYTES = 9  # in a message


def cut(text: str) -> str:
    """At most what a message's text may hold."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """A message for one connection."""

    peer: Peer
    message: CoordinatorToServer


class Outbound:
    """Collects what is to be sent; the service sends it."""

    def __init__(self, settings: ServiceSettings, core: Coordinator) -> None:
        self.settings = settings
        self.core = core
        self.proofs = LeaseProofs(bytes.fromhex(settings.lease_secret))
        self.sessions = Sessions()
        self.letters: deque[Letter] = deque()
        self.grants: deque[GrantLease | GrantEvaluation] = deque()  # to be made into messages, which takes a row
        self.reports: deque[EvaluationReport] = deque()  # for the learner
        self.records: list[Record] = []  # to be written into the journal
        self.promises: list[Promise] = []  # true only once those records are written
        self._blocked: dict[str, None] = {}  # keys, or connections without one; the oldest first

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            match decision:
                case GrantLease() | GrantEvaluation():
                    self.grants.append(decision)
                case ReportEvaluation():
                    self.reports.append(_report(decision))
                case HoldFor():
                    self._tell_hold(decision)
                case AcceptGroup() | FilterGroup() | DeliverBatch() | ForgetTrained() | ParkTask():
                    self._record(decision)
                case Quarantine():
                    self._quarantine(decision)
                case DropServer():
                    self._drop(decision)
                case _:
                    self._answer(decision)

    def say(self, peer: Peer, message: CoordinatorToServer) -> None:
        self.letters.append(Letter(peer=peer, message=message))

    def say_to(self, server_id: str, message: CoordinatorToServer) -> None:
        """Nothing is said to a server that has no connection: it is told what it needs when it is back."""
        session = self.sessions.of_server(server_id)
        if session is not None:
            self.say(session.peer, message)

    def lend(self, server_id: str, granted: Sequence[tuple[GrantLease, Task]]) -> None:
        """The rows of granted leases are there: tell the server those that have not ended meanwhile, in one message."""
        session = self.sessions.of_server(server_id)
        if session is None:  # it is told when it is back
            return
        leases = tuple(
            self._lease(grant, task, session)
            for grant, task in granted
            if self.core.book.lease_of(server_id, grant.lease_id) is not None
        )
        if leases:
            self.say(session.peer, Leases(leases=leases))

    def _lease(self, grant: GrantLease, task: Task, session: Session) -> Lease:
        return Lease(
            lease_id=grant.lease_id,
            task_id=grant.task_id,
            environment=self.settings.environments[task.environment].name,
            row=task.row,
            group_size=self.settings.group_size,
            seed=task.seed,
            min_version=grant.min_version,
            max_group_bytes=self.settings.rules.max_group_bytes,
            proof=self.proofs.of(
                lease_id=grant.lease_id, task_id=grant.task_id, min_version=grant.min_version, holder=session.holder
            ),
        )

    def lend_evaluation(self, grant: GrantEvaluation, task: Task) -> None:
        """Likewise for a task of an evaluation. Nothing of it is journaled, and no coordinator but this knows of it."""
        if self.settings.evaluation is None or not self.core.evaluations.is_running(
            grant.server_id, grant.evaluation_id
        ):
            return
        evaluate = Evaluate(
            evaluation_id=grant.evaluation_id,
            task_id=grant.task_id,
            version=grant.version,
            environment=self.settings.environments[task.environment].name,
            row=task.row,
            samples=self.settings.evaluation.samples,
            seed=task.seed,
            temperature=self.settings.evaluation.temperature,
        )
        self.say_to(grant.server_id, evaluate)

    def _tell_hold(self, hold: HoldFor) -> None:
        message = HoldVersions(first=hold.first, last=hold.last)
        for session in self.sessions:
            if session.ready and hold.server_id in ("", session.server_id):
                self.say(session.peer, message)

    def pulse(self, session: Session, now: float) -> None:
        """What is published, and what the server waits for."""
        waiting_for = what_a_server_waits_for(self.core, session.server_id, now)
        self.say(session.peer, Pulse(published_version=self.core.book.published_version, waiting_for=waiting_for))

    def close(self, reason: str) -> None:
        """The run is over; every server is told."""
        self.core.close(reason)
        for session in self.sessions:
            self.say(session.peer, Finished(reason=cut(reason)))

    def is_blocked(self, peer: Peer) -> bool:
        return (peer.key or peer.routing_id.hex()) in self._blocked

    def block(self, peer: Peer) -> None:
        """Listen to this key, or to this connection if it has none, no more."""
        self._blocked[peer.key or peer.routing_id.hex()] = None
        if len(self._blocked) > MAX_BLOCKED:
            del self._blocked[next(iter(self._blocked))]

    def take_records(self) -> tuple[list[Record], list[Promise]]:
        """What is to be written, and what may be said once it is."""
        taken = self.records, self.promises
        self.records, self.promises = [], []
        return taken

    def acknowledge(self, promises: Iterable[AcceptGroup | FilterGroup | RefuseGroup]) -> None:
        """The journal has these groups, or says that they are not needed: servers may forget them."""
        accepted: defaultdict[str, list[int]] = defaultdict(list)
        refused: list[RefuseGroup] = []  # duplicates of those that were accepted before
        for promise in promises:
            if isinstance(promise, RefuseGroup):
                refused.append(promise)
            else:
                accepted[promise.server_id].append(promise.lease_id)
        for server_id, all_lease_ids in accepted.items():
            for lease_ids in in_messages(all_lease_ids, lambda _: MAX_ID_BYTES):
                self.say_to(server_id, GroupsAccepted(lease_ids=tuple(lease_ids)))
        for refusal in refused:
            self._refuse(refusal)

    def _record(self, decision: AcceptGroup | FilterGroup | DeliverBatch | ForgetTrained | ParkTask) -> None:
        match decision:
            case AcceptGroup():
                self.records.append(decision.group)
                self.promises.append(decision)
            case FilterGroup():
                self.records.append(FilteredRecord(task_id=decision.task_id, version=decision.version))
                self.promises.append(decision)
            case DeliverBatch():
                lease_ids = tuple(group.lease_id for group in decision.groups)
                self.records.append(BatchRecord(version=decision.version, lease_ids=lease_ids))
                self.promises.append(decision)
            case ForgetTrained():
                self.records.append(ForgetRecord(version=decision.version))
            case ParkTask():
                logger.warning("task %d is parked: %s", decision.task_id, decision.reason)
                self.records.append(ParkedRecord(task_id=decision.task_id, reason=decision.reason))

    def _answer(self, decision: RefuseGroup | CancelLease) -> None:
        match decision:
            case RefuseGroup(kind="duplicate"):
                self.promises.append(decision)  # its server forgets the group, which may be not yet on the disk
            case RefuseGroup():
                self._refuse(decision)
            case CancelLease():
                cancelled = LeaseCancelled(lease_id=decision.lease_id, reason=cut(decision.reason))
                self.say_to(decision.server_id, cancelled)

    def _refuse(self, decision: RefuseGroup) -> None:
        self.say_to(decision.server_id, GroupRefused(lease_id=decision.lease_id, reason=cut(decision.reason)))

    def _drop(self, decision: DropServer) -> None:
        session = self.sessions.of_server(decision.server_id)
        if session is not None:
            logger.warning("server %s is dropped: %s", decision.server_id, decision.reason)
            self.say(session.peer, Refused(reason=cut(decision.reason), retry=decision.may_return))
            self.sessions.end(session)

    def _quarantine(self, decision: Quarantine) -> None:
        logger.error("%s is quarantined: %s", decision.server_id, decision.reason)
        session = self.sessions.of_server(decision.server_id)
        if session is not None:
            self.say(session.peer, Refused(reason=cut(f"quarantined: {decision.reason}")))
            self.block(session.peer)
            self.sessions.end(session)


def _report(decision: ReportEvaluation) -> EvaluationReport:
    return EvaluationReport(
        asked_version=decision.asked_version,
        version=decision.version,
        tasks=tuple(EvaluatedTask(task_id=task, episodes=decision.results[task]) for task in sorted(decision.results)),
        failed=decision.failed,
        unfinished=decision.unfinished,
        reason=decision.reason,
    )
