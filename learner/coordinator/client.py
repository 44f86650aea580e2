"""CoordinatorClient: the learner's side of the conversation with its coordinator, over a local socket.

The coordinator is a process of its own and may be killed at any moment: another one is started, told where the run is,
and asked again what its predecessor did not answer. What was accepted is in the journal.
"""

import asyncio
import itertools
import logging
import os
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from common import messages
from common.codec import Decoder, encode
from common.lifecycle import ChildProcess, UserError
from common.trajectory import Group
from common.wire import Dealer, open_dealer
from learner.coordinator.batch_receiver import BatchReceiver
from learner.coordinator.messages import (
    Batch,
    CheckpointSaved,
    CloseRun,
    CoordinatorStatus,
    CoordinatorToLearner,
    EvaluateVersion,
    EvaluationReport,
    Frontier,
    OpenRun,
    RunOpened,
    SnapshotPublished,
    StepCompleted,
    TakeBatch,
    TakeFrontier,
)
from learner.coordinator.service_settings import ServiceSettings, write_settings

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 1 << 34
SAY_IT_EVERY_S = 5.0
SILENT_S = 3.0  # without a status, which arrives twice a second: then the coordinator itself is waited for
FAREWELL_S = 3.0
COORDINATOR_GRACE_S = 1.0
LONG_LIFE_S = 30.0  # a coordinator that lived shorter is started again only after a pause, which doubles
MAX_PAUSE_S = 4.0


class CoordinatorLostError(UserError):
    """The coordinator process ended by itself; its own messages say why."""


class CoordinatorClient:
    """Requests and their answers, one of a kind at a time; the status arrives on its own about once a second."""

    def __init__(self, settings: ServiceSettings, private_directory: Path) -> None:
        self._settings = settings
        self._directory = private_directory
        self._decoder = Decoder(CoordinatorToLearner, max_payload_bytes=MAX_BATCH_BYTES, max_header_bytes=1 << 28)
        self._run: OpenRun | None = None  # as the coordinator would have to be told it now
        self._published: SnapshotPublished | None = None
        self._untold: list[messages.Message] = []  # progress since OpenRun was said, until it is answered
        self._asked: dict[type[messages.Message], messages.Message] = {}  # by the type of the answer
        self._answers: dict[type[messages.Message], asyncio.Future[messages.Message]] = {}
        self._batch = BatchReceiver()
        self._dealer: Dealer | None = None  # while a coordinator knows the run
        self._starts = asyncio.Event()
        self._ended = asyncio.Event()
        self._lost: CoordinatorLostError | None = None
        self._is_closing = False
        self._waited_s = 0.0
        self._waiting_since_s: float | None = None
        self.pid: int | None = None
        self.status: CoordinatorStatus | None = None
        self._status_s = 0.0  # when it arrived

    async def supervise(self) -> None:
        """Keep a coordinator running until the run is closed; to be run as a task beside the requests.

        Raises CoordinatorLostError when one ended by itself: the next one would do the same.
        """
        try:
            await self._supervise()
        finally:
            self._lose(CoordinatorLostError("the coordinator was stopped; start the learner to resume"))
            self._ended.set()

    async def _supervise(self) -> None:
        pause_s = 0.0
        for life in itertools.count(1):
            born_s = time.monotonic()
            code = await self._live(life)
            if self._is_closing:
                return
            if code >= 0:
                raise self._lose(
                    CoordinatorLostError(f"the coordinator ended with exit code {code}; start the learner to resume")
                )
            pause_s = 0.0 if time.monotonic() - born_s > LONG_LIFE_S else min(MAX_PAUSE_S, max(0.25, 2 * pause_s))
            logger.error("the coordinator was killed by signal %d; starting another in %.2f s", -code, pause_s)
            await asyncio.sleep(pause_s)

    async def open_run(self, request: OpenRun) -> str:
        """Returns the address rollout servers join at, as bound."""
        self._run = request
        self._starts.set()
        opened = await self._ask(request, RunOpened)
        assert isinstance(opened, RunOpened)
        return opened.listen_address

    async def take_batch(self, version: int) -> tuple[Group, ...]:
        """Groups for the step that updates `version`; waits as long as it takes, and says for what."""
        self._waiting_since_s = time.monotonic()
        try:
            batch = await self._ask(TakeBatch(version=version), Batch)
        finally:
            self._waited_s, self._waiting_since_s = self.waited_s, None
        assert isinstance(batch, Batch)
        if batch.version != version:
            raise RuntimeError(f"asked for a batch for version {version}, was given one for {batch.version}")
        return self._batch.take()

    @property
    def waited_s(self) -> float:
        """Time the learner spent waiting for batches so far."""
        since_s = self._waiting_since_s
        return self._waited_s + (time.monotonic() - since_s if since_s is not None else 0.0)

    async def step_completed(self, version: int, lease_ids: tuple[int, ...]) -> None:
        assert self._run is not None
        self._run = msgspec.structs.replace(self._run, version=version)
        await self._tell(StepCompleted(version=version, lease_ids=lease_ids))

    async def published(self, version: int) -> None:
        self._published = SnapshotPublished(version=version)
        if self._run is not None:
            self._run = msgspec.structs.replace(self._run, published_version=version)
        await self._tell(self._published)

    async def evaluate(self, version: int) -> EvaluationReport:
        """The evaluation of `version`, or of a later one that was had in its place; one at a time."""
        report = await self._ask(EvaluateVersion(version=version), EvaluationReport)
        assert isinstance(report, EvaluationReport)
        return report

    async def take_frontier(self) -> bytes:
        """What a checkpoint must hold of the coordinator."""
        frontier = await self._ask(TakeFrontier(), Frontier)
        assert isinstance(frontier, Frontier)
        return frontier.frontier

    async def checkpoint_saved(self, version: int, frontier: bytes) -> None:
        """From now on a restart of the learner goes on from there: what was trained before need not be kept."""
        assert self._run is not None
        self._run = msgspec.structs.replace(self._run, frontier=frontier)
        await self._tell(CheckpointSaved(version=version))

    async def close_run(self, reason: str) -> None:
        """The coordinator tells the servers that the run is over, and ends; returns when it has."""
        self._is_closing = True
        await self._tell(CloseRun(reason=reason))
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await self._ended.wait()

    # --- one coordinator after the other ---------------------------------------------------------------------------

    async def _live(self, life: int) -> int:
        """One coordinator process from its start to its end; returns its exit code."""
        settings = msgspec.structs.replace(self._settings, learner_socket=f"{self._settings.learner_socket}-{life}")
        path = self._directory / "coordinator.json"
        write_settings(settings, path)
        arguments = ("learner.coordinator", str(path), "--parent", str(os.getpid()))
        child = ChildProcess.run_module(*arguments, grace_s=COORDINATOR_GRACE_S)
        async with child as process, open_dealer(settings.learner_socket, max_frame_bytes=None) as dealer:
            self.pid = process.pid
            async with asyncio.TaskGroup() as tasks:
                conversation = tasks.create_task(self._converse(dealer))
                code = await process.wait()
                conversation.cancel()
        return code

    async def _converse(self, dealer: Dealer) -> None:
        """Open the run with a new coordinator, then hand every message to whom it is for."""
        try:
            await self._starts.wait()
            assert self._run is not None
            self._untold.clear()
            await dealer.send(encode(self._run))
            while True:
                message, payload = self._decoder.decode(await dealer.receive())
                if isinstance(message, RunOpened):
                    await self._opened(dealer, message)
                if isinstance(message, CoordinatorStatus):
                    self.status, self._status_s = message, time.monotonic()
                elif not isinstance(message, Batch) or self._batch.add(message, payload):
                    self._answer(message)
        finally:
            self._dealer = None

    async def _opened(self, dealer: Dealer, opened: RunOpened) -> None:
        """This coordinator knows the run: tell it what its predecessor knew, ask it what that did not answer."""
        self._settings = msgspec.structs.replace(self._settings, listen=opened.listen_address)
        while self._untold:
            await dealer.send(encode(self._untold.pop(0)))
        self._dealer = dealer
        if self._published is not None:
            await dealer.send(encode(self._published))
        for request in self._asked.values():
            if not isinstance(request, OpenRun):
                await dealer.send(encode(request))

    def _answer(self, message: messages.Message) -> None:
        self._asked.pop(type(message), None)
        answer = self._answers.pop(type(message), None)
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _lose(self, error: CoordinatorLostError) -> CoordinatorLostError:
        """There will be no coordinator any more: whoever waits for one, or will, is told the first reason why."""
        self._lost = self._lost or error
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._lost)
                answer.exception()  # seen, also when the asker is cancelled before it looks
        return self._lost

    async def _tell(self, message: messages.Message) -> None:
        """A coordinator that is not there now will be told when it is: by OpenRun, or when it has answered that."""
        if self._dealer is not None:
            await self._dealer.send(encode(message))
        elif isinstance(message, StepCompleted | CheckpointSaved):
            self._untold.append(message)

    async def _ask(self, request: messages.Message, answer_type: type[messages.Message]) -> messages.Message:
        if self._lost is not None:
            raise self._lost
        answer: asyncio.Future[messages.Message] = asyncio.get_running_loop().create_future()
        self._asked[answer_type], self._answers[answer_type] = request, answer
        await self._tell(request)
        asked_s = time.monotonic()
        while True:
            done, _ = await asyncio.wait({answer}, timeout=SAY_IT_EVERY_S)
            if done:
                return answer.result()
            logger.info("waiting since %.0f s: %s", time.monotonic() - asked_s, self._what_for(answer_type))

    def _what_for(self, answer_type: type[messages.Message]) -> str:
        """What an answer of this type waits for, for people."""
        if self.status is None or self._dealer is None:
            return "the coordinator to start"
        silent_s = time.monotonic() - self._status_s
        if silent_s > SILENT_S:
            return f"the coordinator, process {self.pid}: nothing heard of it for {silent_s:.0f} s"
        if answer_type is EvaluationReport:
            return f"evaluation of {self.status.evaluation}" if self.status.evaluation else "a report is on its way"
        return self.status.waiting_for or "a batch is on its way"
