"""LearnerLoop: take a batch, step, publish, advance. The clock of the whole run."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

from common.canary import Canary
from common.events import EventLog
from common.lifecycle import DedicatedThread
from common.trajectory import Group
from learner.batching import build_batch
from learner.canary import CanaryMaker
from learner.checkpoint_writer import CheckpointWriter
from learner.coordinator.client import CoordinatorClient
from learner.publisher import Publisher
from learner.refusals import Refusals
from learner.training import StepResult, TrainEngine, TrainSettings

logger = logging.getLogger(__name__)


class StepObserver(Protocol):
    """Hears of every step: event log, progress display, trackers."""

    def step_completed(self, version: int, groups: tuple[Group, ...], result: StepResult) -> None: ...


class LearnerLoop:
    """Trains until `total_steps`; may be cancelled at any moment and then leaves a checkpoint."""

    def __init__(
        self,
        *,
        settings: TrainSettings,
        checkpoint_every_steps: int,
        engine: TrainEngine,
        training: DedicatedThread,
        coordinator: CoordinatorClient,
        publisher: Publisher,
        canaries: CanaryMaker,
        checkpoints: CheckpointWriter,
        refusals: Refusals,
        events: EventLog,
        observers: Sequence[StepObserver],
        at_the_end: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:
        """at_the_end: what the run waits for when the last step is taken and saved; it is told the version."""
        self._settings = settings
        self._checkpoint_every_steps = checkpoint_every_steps
        self._engine = engine
        self._training = training
        self._coordinator = coordinator
        self._publisher = publisher
        self._canaries = canaries
        self._checkpoints = checkpoints
        self._refusals = refusals
        self._events = events
        self._observers = observers
        self._at_the_end = at_the_end
        self._unpublished = asyncio.Event()  # set while a version waits for a slot

    async def run(self) -> None:
        """Returns when the last step is taken; a cancellation leaves a checkpoint of the steps that were."""
        async with asyncio.TaskGroup() as tasks:
            late = tasks.create_task(self._publish_late())
            await self._publish()
            await finish(self._save_whole())  # whatever happens next, there is something to resume from
            try:
                while self._engine.version < self._settings.total_steps:
                    await self._train_once()
            finally:
                await finish(self._save_whole())
            if self._at_the_end is not None:
                await self._at_the_end(self._engine.version)
            late.cancel()

    async def _train_once(self) -> None:
        self._checkpoints.check()
        version = self._engine.version
        with self._events.interval("wait_batch", version=version):
            groups = await self._coordinator.take_batch(version)
        # Once begun, a step is finished and reported: a cancellation that comes meanwhile is obeyed after it.
        await finish(self._take_step(groups))

    async def _take_step(self, groups: tuple[Group, ...]) -> None:
        version = self._engine.version
        with self._events.interval("train", version=version):
            result = await self._training.run(self._step, groups)
        stop = None
        if result.refusal is None:
            self._refusals.step_taken()
        else:
            stop = await self._training.run(self._refusals.step_refused, version, groups, result)
        if stop is not None and self._engine.version == version:
            raise stop
        version = self._engine.version  # also of a step that was skipped: its batch is not to come again
        await self._coordinator.step_completed(version, tuple(group.lease_id for group in groups))
        await self._publish()
        for observer in self._observers:
            observer.step_completed(version, groups, result)
        if stop is not None:
            raise stop
        if version % self._checkpoint_every_steps == 0:
            await self._checkpoints.begin()

    async def _save_whole(self) -> None:
        await self._checkpoints.begin()
        await self._checkpoints.done()

    def _step(self, groups: tuple[Group, ...]) -> StepResult:
        batch = build_batch(
            groups,
            version=self._engine.version,
            max_staleness=self._settings.max_staleness,
            micro_batch_tokens=self._settings.micro_batch_tokens,
            layout=self._engine.layout,
        )
        return self._engine.step(batch)

    async def _publish(self) -> None:
        """Copy the parameters out, between two steps; later, when every slot is still being read."""
        slot = self._publisher.take_slot()
        if slot is None:
            self._unpublished.set()
            return
        self._unpublished.clear()
        with self._events.interval("publish", num_bytes=self._publisher.num_bytes) as fields:
            version, canary, fields["canary_s"] = await self._training.run(self._copy_out, slot)
            fields["version"] = version
        await self._publisher.hand_over(slot, version, canary)

    def _copy_out(self, slot: int) -> tuple[int, Canary | None, float]:
        """(version, its canary, seconds that the canary took); no step comes between the copy and the canary."""
        self._publisher.write(slot, self._engine.snapshot_tensors())
        start_s = time.monotonic()
        canary = self._canaries.make(self._engine)
        return self._engine.version, canary, time.monotonic() - start_s

    async def _publish_late(self) -> None:
        while True:
            await self._unpublished.wait()
            await self._publisher.slot_free()
            if self._unpublished.is_set():
                await self._publish()


async def finish(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` to its end even when cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()
        raise
