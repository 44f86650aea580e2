"""The coordinator as a process: sockets, clock and waiting around the rules in core.py. It decides nothing.

rollout servers  <-- Router, tcp, keys -->  inbound / core / outbound  <-- Router, ipc -->  learner
                                                        |
                                                     journal
"""

import asyncio
import logging
import secrets
import time

from common.codec import Decoder, ProtocolError, encode
from common.events import EventLog
from common.messages import MAX_TOGETHER_BYTES, ServerToCoordinator
from common.wire import Incoming, Peer, Router
from learner.coordinator.batch_sender import BatchSender
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import DeliverBatch
from learner.coordinator.delivery import LearnerError
from learner.coordinator.inbound import Inbound
from learner.coordinator.inbox import Inbox
from learner.coordinator.journal_keeper import JournalKeeper
from learner.coordinator.lender import Lender
from learner.coordinator.mailer import MAX_KEPT_BYTES, Mailer
from learner.coordinator.messages import (
    CheckpointSaved,
    CloseRun,
    CoordinatorToLearner,
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
from learner.coordinator.outbound import Outbound
from learner.coordinator.relay_plans import RelayPlans
from learner.coordinator.service_settings import ServiceSettings
from learner.coordinator.status import status_of
from learner.coordinator.tasks import Tasks
from learner.coordinator.token_ages import TokenAges
from learner.coordinator.turns import Turn

logger = logging.getLogger(__name__)

TICK_S = 0.5
RETRY_S = 0.02
MAX_HEADER_BYTES = 1 << 20
MAX_LEARNER_HEADER_BYTES = 2 << 20  # a frontier and some more


class Service:
    """One run, from OpenRun to CloseRun."""

    def __init__(
        self,
        settings: ServiceSettings,
        tasks: Tasks,
        core: Coordinator,
        run: OpenRun,
        *,
        servers: Router,
        learner: Router,
        learner_peer: Peer,
        journal: JournalKeeper,
        events: EventLog | None,
        evaluation_tasks: Tasks | None = None,
    ) -> None:
        self._core = core
        self._outbound = Outbound(settings, core)
        self._inbound = Inbound(settings, core, run, self._outbound, session=secrets.token_hex(8))
        self._relay_plans = RelayPlans(settings.relay_weights, self._outbound)
        self._servers = servers
        self._learner = learner
        self._learner_peer = learner_peer
        self._journal = journal
        self._events = events
        self._ages = TokenAges()
        self._batches = BatchSender(learner, learner_peer, journal, ages=self._ages, events=events)
        self._to_servers = Mailer(servers)
        self._to_learner = Mailer(learner)
        self._lender = Lender(
            tasks, self._outbound, self._to_servers, post=self._post, evaluation_tasks=evaluation_tasks
        )
        self._inbox = Inbox()
        self._decoder = Decoder(
            ServerToCoordinator,
            max_payload_bytes=max(MAX_TOGETHER_BYTES, settings.rules.max_group_bytes),
            max_header_bytes=MAX_HEADER_BYTES,
        )
        self._recorded = asyncio.Event()
        self._done = asyncio.Event()

    async def run(self) -> None:
        """Serve until the learner closes the run."""
        self._tell_learner(RunOpened(listen_address=self._servers.address))
        async with asyncio.TaskGroup() as group:
            loops = (
                self._receive_from_servers(), self._hear_servers(), self._hear_learner(), self._lender.run(),
                self._batches.run(), self._tick(), self._retry(),
            )  # fmt: skip
            group.create_task(self._keep_journal())
            running = [group.create_task(loop) for loop in loops]
            await self._done.wait()
            for task in running:
                task.cancel()

    async def _receive_from_servers(self) -> None:
        while True:
            messages = await self._servers.receive()
            turn = Turn()
            for incoming in messages:
                if self._outbound.is_blocked(incoming.peer):  # before it is looked at or kept: floods must be cheap
                    continue
                if not self._inbox.may_be_heard_now(incoming):
                    self._inbox.put(incoming)
                    continue
                self._hear_server(incoming)
                if turn.is_over:
                    self._post()
                    await turn.next()
            self._post()
            await self._inbox.wait_for_room()

    async def _hear_servers(self) -> None:
        while True:
            await self._inbox.wait_for_messages()
            turn = Turn()
            while (incoming := self._inbox.take()) is not None:
                self._hear_server(incoming)
                if turn.is_over:
                    self._post()
                    await turn.next()
                    await self._lender.wait_until_sent()  # a server may have nothing to do until its lease comes
            self._post()

    def _hear_server(self, incoming: Incoming) -> None:
        now = time.monotonic()
        try:
            message, payload = self._decoder.decode(incoming.frames)
        except ProtocolError as error:
            self._inbound.hear_garbage(incoming.peer, str(error), now)
            return
        self._inbound.hear(incoming.peer, message, payload, now)  # type: ignore[arg-type]  # of the decoder's union

    async def _hear_learner(self) -> None:
        decoder = Decoder(LearnerToCoordinator, max_payload_bytes=0, max_header_bytes=MAX_LEARNER_HEADER_BYTES)
        while True:
            for incoming in await self._learner.receive():
                message, _ = decoder.decode(incoming.frames)
                self._hear_from_learner(message)  # type: ignore[arg-type]  # of the decoder's union
            self._post()

    def _hear_from_learner(self, message: LearnerToCoordinator) -> None:
        match message:
            case TakeBatch() | StepCompleted() | CheckpointSaved() | SnapshotPublished():
                self._hear_of_progress(message, time.monotonic())
            case EvaluateVersion():
                self._outbound.carry_out(self._core.evaluate(message.version, time.monotonic()))
            case TakeFrontier():
                self._tell_learner(Frontier(version=self._core.version, frontier=self._core.frontier()))
            case CloseRun():
                logger.info("the learner closes the run: %s", message.reason)
                self._outbound.close(message.reason)
                self._done.set()
                self._recorded.set()
            case OpenRun():
                raise LearnerError("the learner opened the run twice; start a new coordinator for a new run")

    def _hear_of_progress(
        self, message: TakeBatch | StepCompleted | CheckpointSaved | SnapshotPublished, now: float
    ) -> None:
        match message:
            case TakeBatch():
                self._outbound.carry_out(self._core.take_batch(message.version, now))
            case StepCompleted():
                self._outbound.carry_out(self._core.step_completed(message.version, message.lease_ids, now))
            case CheckpointSaved():
                self._outbound.carry_out(self._core.checkpointed(message.version))
            case SnapshotPublished():
                self._outbound.carry_out(self._core.published(message.version, now))
                for session in self._outbound.sessions:
                    self._outbound.pulse(session, now)

    async def _keep_journal(self) -> None:
        """What was accepted is acknowledged, and what was chosen is trained, only once it is on the disk.

        Returns when the run is closed and all of it is.
        """
        is_closed = False
        while not is_closed:
            await self._recorded.wait()
            self._recorded.clear()
            is_closed = self._done.is_set()
            await self._keep_records()
            self._post()

    async def _keep_records(self) -> None:
        records, promises = self._outbound.take_records()
        await self._journal.keep(records, self._core.book.past())
        answers = []
        for promise in promises:
            if isinstance(promise, DeliverBatch):
                self._batches.put(promise)
            else:
                answers.append(promise)
        self._outbound.acknowledge(answers)

    async def _tick(self) -> None:
        self._inbound.tick(time.monotonic())  # from now on its own pauses are told from the servers' silence
        while True:
            await asyncio.sleep(TICK_S)
            now = time.monotonic()
            self._inbound.tick(now)
            self._relay_plans.tell(now, self._servers.is_revoked)
            self._post()
            self._report(now)

    def _report(self, now: float) -> None:
        status = status_of(
            self._core,
            self._outbound.sessions,
            self._ages,
            now,
            listen_address=self._servers.address,
            strangers=self._servers.refusals(),
        )
        if not self._to_learner.is_behind(self._learner_peer):
            self._tell_learner(status)
        if self._events is not None:
            self._events.emit(
                "coordinator_status",
                version=self._core.version,
                servers=len(status.servers),
                running=status.running,
                queued=status.queued,
                queued_bytes=status.queued_bytes,
                waiting_for=status.waiting_for,
            )

    async def _retry(self) -> None:
        while True:
            await asyncio.sleep(RETRY_S)
            self._to_servers.retry()
            self._lender.retry()
            self._to_learner.retry()

    def _post(self) -> None:
        """Send what has been decided."""
        letters = self._outbound.letters
        while letters:
            letter = letters.popleft()
            if not self._to_servers.send(letter.peer, encode(letter.message)):
                session = self._outbound.sessions.of_peer(letter.peer)
                if session is not None:
                    reason = f"left more than {MAX_KEPT_BYTES} bytes of messages unread"
                    self._outbound.carry_out(self._core.server_lost(session.server_id, reason, time.monotonic()))
        while self._outbound.reports:
            self._tell_learner(self._outbound.reports.popleft())
        if self._outbound.grants:
            self._lender.wake()
        if self._outbound.records or self._outbound.promises:
            self._recorded.set()

    def _tell_learner(self, message: CoordinatorToLearner) -> None:
        self._to_learner.send(self._learner_peer, encode(message))
