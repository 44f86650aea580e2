"""SimulatedCoordinator: one coordinator process. All of its rules are the real ones; sockets, disk and clock are not.

It does what learner/coordinator/service.py does, and notes what can be seen of it.
"""

from collections import defaultdict
from typing import TYPE_CHECKING

from common.messages import Evaluated, EvaluationFailed, GroupsFinished, Heartbeat, LeaseFailed, Ready
from common.together import in_messages
from common.wire import Peer
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import DeliverBatch, GrantEvaluation
from learner.coordinator.inbound import Inbound
from learner.coordinator.journal import BatchRecord, FilteredRecord, Record
from learner.coordinator.journal_keeper import JournalKeeper
from learner.coordinator.ledger import PastLeases, decode_frontier
from learner.coordinator.messages import (
    Batch,
    CheckpointSaved,
    EvaluateVersion,
    Frontier,
    LearnerToCoordinator,
    OpenRun,
    RunOpened,
    SnapshotPublished,
    StepCompleted,
    TakeBatch,
    TakeFrontier,
)
from learner.coordinator.outbound import Promise
from learner.coordinator.replay_queue import FinishedGroup, JournaledGroup
from learner.coordinator.tasks import Task
from tests.simulation import history as seen
from tests.simulation.groups import nonce_of
from tests.simulation.journal import AtOnce, result_of
from tests.simulation.network import Connection, Said
from tests.simulation.observed import ObservedOutbound

if TYPE_CHECKING:
    from tests.simulation.world import World

TICK_S = 0.5
SERVERS_RETURN_S = 2.0
ROW = b'{"prompt":"x"}'


class SimulatedCoordinator:
    """From OpenRun until it is killed."""

    def __init__(self, world: "World", run: OpenRun, *, life: int) -> None:
        self.world = world
        self.life = life
        self.is_alive = True
        self.is_listening = False
        self.connections: dict[Peer, Connection] = {}
        self.paused_until = 0.0
        self._paused_at: float | None = None
        self._paused_s = 0.0  # in all, short pauses excepted
        self.disk_s = world.plan.commit_s
        self._backlog: list[tuple[bool, Peer | None, object, bytes]] = []  # what came while it was stopped
        self._confirmed: dict[str, int] = {}
        self._writing: tuple[list[Record], PastLeases] | None = None
        lineage = world.service_settings.run_id
        world.journal.open(lineage)
        self._keeper = JournalKeeper(world.journal, AtOnce(), lineage=lineage)  # type: ignore[arg-type]
        rules = world.plan.rules
        frontier = decode_frontier(run.frontier, version=run.version, source=rules.source)
        contents = result_of(self._keeper.contents(frontier, is_new_run=not run.frontier))
        self.core = Coordinator(
            rules,
            version=run.version,
            frontier=run.frontier,
            journal=contents,
            published_version=run.published_version,
            servers_return_until=world.clock.now + SERVERS_RETURN_S if self._keeper.is_of_this_life else None,
        )
        result_of(self._keeper.keep((), self.core.book.past()))
        self.outbound = ObservedOutbound(self)
        session = f"session-{life}"
        self._inbound = Inbound(world.service_settings, self.core, run, self.outbound, session=session)
        world.note(seen.CoordinatorOpened(world.clock.now, life, run.version))
        self.outbound.observe()

    def start(self) -> None:
        """Listen, and say so."""
        self.is_listening = True
        self._tell_learner(RunOpened(listen_address="tcp://simulated"))
        self._inbound.tick(self.world.clock.now)
        self.world.clock.after(TICK_S, self._tick)
        for line in self.world.lines():
            self.world.clock.after(self.world.rng.uniform(0.0, 0.3), line.connect)

    # --- what comes ------------------------------------------------------------------------------------------------

    def hear(self, peer: Peer, message: Said, payload: bytes) -> None:
        """From a server."""
        if not self.is_alive:
            return
        now = self.world.clock.now
        if now < self.paused_until:
            self._backlog.append((False, peer, message, payload))
            return
        if isinstance(message, str):
            self._inbound.hear_garbage(peer, message, now)
        else:
            self._watch(peer, message, payload, now)
            self._inbound.hear(peer, message, payload, now)
        self._post()

    def hear_learner(self, message: LearnerToCoordinator) -> None:
        if not self.is_alive:
            return
        now = self.world.clock.now
        if now < self.paused_until:
            self._backlog.append((True, None, message, b""))
            return
        match message:
            case TakeBatch():
                self.outbound.carry_out(self.core.take_batch(message.version, now))
            case StepCompleted():
                self.outbound.carry_out(self.core.step_completed(message.version, message.lease_ids, now))
            case CheckpointSaved():
                self.outbound.carry_out(self.core.checkpointed(message.version))
            case SnapshotPublished():
                self.outbound.carry_out(self.core.published(message.version, now))
                for session in self.outbound.sessions:
                    self.outbound.pulse(session, now)
            case EvaluateVersion():
                self.outbound.carry_out(self.core.evaluate(message.version, now))
            case TakeFrontier():
                self._tell_learner(Frontier(version=self.core.version, frontier=self.core.frontier()))
        self._post()

    def _watch(self, peer: Peer, message: Said, payload: bytes, now: float) -> None:
        """Note what the message means to somebody who only sees who says what."""
        session = self.outbound.sessions.of_peer(peer)
        if session is None or self.outbound.is_blocked(peer):
            return
        server = session.server_id
        match message:
            case Ready():
                self.outbound.heard(server)
                self.outbound.note_claims(server, message.held)
                self._confirmed.pop(server, None)
                self.world.note(seen.Joined(now, self.life, server, peer.key, message.capacity_groups))
            case Heartbeat():
                self.outbound.heard(server)
                self._watch_version(server, message.loaded_version, now)
            case LeaseFailed():
                if self.core.book.lease_of(server, message.lease_id) is not None:
                    self.outbound.heard(server)
                self.world.note(seen.Failed(now, self.life, server, message.lease_id))
            case Evaluated() | EvaluationFailed():
                self.world.note(seen.EvaluationHeard(now, self.life, server, message.evaluation_id))
            case GroupsFinished():
                self.outbound.note_groups(message.groups, payload)

    def _watch_version(self, server: str, version: int, now: float) -> None:
        if server in self.core.members and self._confirmed.get(server) != version:
            self._confirmed[server] = version
            self.world.note(seen.Confirmed(now, self.life, server, version))

    def _tick(self) -> None:
        if not self.is_alive:
            return
        now = self.world.clock.now
        if now < self.paused_until:
            self.world.clock.at(self.paused_until, self._tick)
            return
        self._inbound.tick(now)
        self.outbound.observe()
        self._post()
        self.world.clock.after(TICK_S, self._tick)

    # --- what goes -------------------------------------------------------------------------------------------------

    def _post(self) -> None:
        world, outbound = self.world, self.outbound
        while outbound.letters:
            letter = outbound.letters.popleft()
            connection = self.connections.get(letter.peer)
            if connection is not None and connection.carries_down:
                connection.line.deliver(connection, letter.message)
        while outbound.reports:
            self._tell_learner(outbound.reports.popleft())
        if outbound.grants:
            grants = list(outbound.grants)
            outbound.grants.clear()
            world.clock.after(0.002, self._lend, grants)
        if (outbound.records or outbound.promises) and self._writing is None:
            self._write()

    def _lend(self, grants: list[object]) -> None:
        """The rows of these tasks are there."""
        if self._when_awake(self._lend, grants):
            leases = defaultdict(list)
            for grant in grants:
                task = Task(row=ROW, seed=grant.task_id)
                if isinstance(grant, GrantEvaluation):
                    self.outbound.lend_evaluation(grant, task)
                else:
                    leases[grant.server_id].append((grant, task))
            for server_id, granted in leases.items():
                for some in in_messages(granted, lambda _: len(ROW)):
                    self.outbound.lend(server_id, some)
            self._post()

    def _write(self) -> None:
        """One transaction at a time; meanwhile the next one gathers."""
        records, promises = self.outbound.take_records()
        self._writing = (records, self.core.book.past())
        self.world.clock.after(self.disk_s * (0.5 + self.world.rng.random()), self._written, promises)

    def _written(self, promises: list[Promise]) -> None:
        if not self.is_alive:
            return
        assert self._writing is not None
        (records, past), self._writing = self._writing, None
        result_of(self._keeper.keep(records, past))
        self._note_committed(records)
        self._keep_promises(promises)

    def _keep_promises(self, promises: list[Promise]) -> None:
        if not self._when_awake(self._keep_promises, promises):
            return
        for promise in promises:
            if isinstance(promise, DeliverBatch):
                self._deliver(promise)
        self.outbound.acknowledge([promise for promise in promises if not isinstance(promise, DeliverBatch)])
        self._post()

    def _deliver(self, batch: DeliverBatch) -> None:
        """In one part, and at once."""
        on_disk = [group.lease_id for group in batch.groups if isinstance(group, JournaledGroup)]
        stored = result_of(self._keeper.read(on_disk))
        contents = [
            (group.header, group.payload) if isinstance(group, FinishedGroup) else stored[group.lease_id]
            for group in batch.groups
        ]
        headers, payload = tuple(header for header, _ in contents), b"".join(payload for _, payload in contents)
        self.outbound.note_delivered(batch.version, headers, payload)
        self._tell_learner(Batch(version=batch.version, groups=headers), payload)

    def _tell_learner(self, message: object, payload: bytes = b"") -> None:
        self.world.learner.hear_later(self, message, payload)

    # --- what goes wrong -------------------------------------------------------------------------------------------

    def pause(self, pause_s: float) -> None:
        """SIGSTOP, then SIGCONT. Which socket is read first afterwards is not defined."""
        now = self.world.clock.now
        self.world.note(seen.CoordinatorPaused(now, self.life, pause_s))
        if self._paused_at is None:
            self._paused_at = now
        self.paused_until = max(self.paused_until, now + pause_s)
        self.world.clock.at(self.paused_until, self._wake)

    def running_s(self) -> float:
        """A clock that stands while the process does, for long: what it did not hear then was not silence."""
        return self.world.clock.now - self._paused_s

    def _wake(self) -> None:
        now = self.world.clock.now
        if not self.is_alive or now < self.paused_until or self._paused_at is None:
            return
        if now - self._paused_at > self.world.plan.rules.server_timeout_s / 2:
            self._paused_s += now - self._paused_at
        self._paused_at = None
        backlog, self._backlog = self._backlog, []
        learner_first = self.world.rng.random() < 0.5
        for of_learner in (learner_first, not learner_first):
            for is_learners, peer, message, payload in backlog:
                if is_learners != of_learner:
                    continue
                if is_learners:
                    self.hear_learner(message)
                else:
                    self.hear(peer, message, payload)

    def crash(self) -> None:
        """SIGKILL: only what the disk has is left. The transaction under way may be on it, and nobody was told."""
        self.is_alive = self.is_listening = False
        if self._writing is not None and self.world.rng.random() < 0.5:
            records, past = self._writing
            self.world.journal.commit(records, past)
            self._note_committed(records)
        self.world.note(seen.CoordinatorCrashed(self.world.clock.now, self.life))
        for connection in list(self.connections.values()):
            connection.line.cut()

    def _when_awake(self, action: object, *arguments: object) -> bool:
        """False: not now; the action is called again when the process runs, if it ever does."""
        if not self.is_alive:
            return False
        if self.world.clock.now < self.paused_until:
            self.world.clock.at(self.paused_until, action, *arguments)
            return False
        return True

    def _note_committed(self, records: list[Record]) -> None:
        nonces = tuple(nonce_of(record.payload) for record in records if isinstance(record, FinishedGroup))
        batches = tuple(record.version for record in records if isinstance(record, BatchRecord))
        filtered = tuple(record.task_id for record in records if isinstance(record, FilteredRecord))
        self.world.note(seen.Committed(self.world.clock.now, self.life, nonces, filtered, batches))
