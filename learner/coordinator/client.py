"""CoordinatorClient: the learner's side of the conversation with its coordinator, over a local socket."""

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from common import messages
from common.codec import Decoder, encode, unpack_groups
from common.lifecycle import ChildProcess, UserError
from common.trajectory import Group
from common.wire import Dealer, open_dealer
from learner.coordinator.service_settings import ServiceSettings, write_settings

logger = logging.getLogger(__name__)

MAX_BATCH_BYTES = 1 << 34
SAY_IT_EVERY_S = 10.0
FAREWELL_S = 3.0
COORDINATOR_GRACE_S = 1.0


class CoordinatorLostError(UserError):
    """The coordinator process ended by itself; its own messages say why."""


class CoordinatorClient:
    """Requests and their answers, one of a kind at a time; the status arrives on its own about once a second."""

    def __init__(self, dealer: Dealer) -> None:
        self._dealer = dealer
        self._decoder = Decoder(
            messages.CoordinatorToLearner, max_payload_bytes=MAX_BATCH_BYTES, max_header_bytes=1 << 28
        )
        self._answers: dict[type[messages.Message], asyncio.Future[tuple[messages.Message, memoryview]]] = {}
        self._lost: CoordinatorLostError | None = None
        self._is_closing = False
        self._waited_s = 0.0
        self._waiting_since_s: float | None = None
        self.status: messages.CoordinatorStatus | None = None

    async def run(self) -> None:
        """Hands every message to whom it is for; to be run as a task beside the requests."""
        while True:
            message, payload = self._decoder.decode(await self._dealer.receive())
            if isinstance(message, messages.CoordinatorStatus):
                self.status = message
            elif (answer := self._answers.pop(type(message), None)) is not None and not answer.done():
                answer.set_result((message, payload))

    async def watch(self, coordinator: ChildProcess) -> None:
        """Ends every request, and raises CoordinatorLostError, when the coordinator process ends."""
        code = await coordinator.wait()
        if self._is_closing:
            return
        self._lost = CoordinatorLostError(f"the coordinator ended with exit code {code}; start the learner to resume")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._lost)
                answer.exception()  # seen, also when the asker is cancelled before it looks
        raise self._lost

    async def open_run(self, request: messages.OpenRun) -> str:
        """Returns the address rollout servers join at, as bound."""
        opened, _ = await self._ask(request, messages.RunOpened)
        assert isinstance(opened, messages.RunOpened)
        return opened.listen_address

    async def take_batch(self, version: int) -> tuple[Group, ...]:
        """Groups for the step that updates `version`; waits as long as it takes, and says for what."""
        self._waiting_since_s = time.monotonic()
        try:
            batch, payload = await self._ask(messages.TakeBatch(version=version), messages.Batch)
        finally:
            self._waited_s, self._waiting_since_s = self.waited_s, None
        assert isinstance(batch, messages.Batch)
        if batch.version != version:
            raise RuntimeError(f"asked for a batch for version {version}, was given one for {batch.version}")
        return unpack_groups(batch.groups, payload)

    @property
    def waited_s(self) -> float:
        """Time the learner spent waiting for batches so far."""
        since_s = self._waiting_since_s
        return self._waited_s + (time.monotonic() - since_s if since_s is not None else 0.0)

    async def step_completed(self, version: int, lease_ids: tuple[int, ...]) -> None:
        await self._dealer.send(encode(messages.StepCompleted(version=version, lease_ids=lease_ids)))

    async def published(self, version: int) -> None:
        await self._dealer.send(encode(messages.SnapshotPublished(version=version)))

    async def take_frontier(self) -> bytes:
        """What a checkpoint must hold of the coordinator."""
        frontier, _ = await self._ask(messages.TakeFrontier(), messages.Frontier)
        assert isinstance(frontier, messages.Frontier)
        return frontier.frontier

    async def close_run(self, reason: str, coordinator: ChildProcess) -> None:
        """The coordinator tells the servers that the run is over, and ends; returns when it has."""
        self._is_closing = True
        await self._dealer.send(encode(messages.CloseRun(reason=reason)))
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_S):
                await coordinator.wait()

    async def _ask(
        self, request: messages.Message, answer_type: type[messages.Message]
    ) -> tuple[messages.Message, memoryview]:
        if self._lost is not None:
            raise self._lost
        answer: asyncio.Future[tuple[messages.Message, memoryview]] = asyncio.get_running_loop().create_future()
        self._answers[answer_type] = answer
        await self._dealer.send(encode(request))
        asked_s = time.monotonic()
        while True:
            done, _ = await asyncio.wait({answer}, timeout=SAY_IT_EVERY_S)
            if done:
                return answer.result()
            waiting_for = self.status.waiting_for if self.status is not None else "the coordinator to start"
            logger.info("waiting since %.0f s: %s", time.monotonic() - asked_s, waiting_for or "a batch is on its way")


@asynccontextmanager
async def open_coordinator(
    settings: ServiceSettings, private_directory: Path
) -> AsyncIterator[tuple[CoordinatorClient, ChildProcess]]:
    """Starts the coordinator process; ends it on exit.

    private_directory: a short path only this user can enter.
    """
    path = private_directory / "coordinator.json"
    write_settings(settings, path)
    arguments = ("learner.coordinator", str(path), "--parent", str(os.getpid()))
    child = ChildProcess.run_module(*arguments, grace_s=COORDINATOR_GRACE_S)
    async with child as process, open_dealer(settings.learner_socket, max_frame_bytes=MAX_BATCH_BYTES) as dealer:
        yield CoordinatorClient(dealer), process
