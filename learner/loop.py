"""LearnerLoop: take a batch, step, publish, advance. The clock of the whole run."""

import asyncio
import logging
from typing import Protocol

from common.events import EventLog
from common.lifecycle import DedicatedThread, UserError
from common.trajectory import Group
from learner.batching import build_batch
from learner.checkpoint import CheckpointStore
from learner.coordinator.client import CoordinatorClient
from learner.publisher import Publisher
from learner.training import StepResult, TrainEngine, TrainSettings

logger = logging.getLogger(__name__)


class StepObserver(Protocol):
    """Hears of every step: progress display, TensorBoard, metrics."""

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
        checkpoints: CheckpointStore,
        events: EventLog,
        observers: list[StepObserver],
    ) -> None:
        self._settings = settings
        self._checkpoint_every_steps = checkpoint_every_steps
        self._engine = engine
        self._training = training
        self._coordinator = coordinator
        self._publisher = publisher
        self._checkpoints = checkpoints
        self._events = events
        self._observers = observers
        self._saved_version = -1
        self._late = asyncio.Event()  # a version could not be published for want of a slot

    @property
    def version(self) -> int:
        return self._engine.version

    async def run(self) -> None:
        """Returns the run's end; a cancellation first leaves a checkpoint, if there is something new to save."""
        async with asyncio.TaskGroup() as tasks:
            helpers = [tasks.create_task(self._announce_versions()), tasks.create_task(self._publish_late())]
            try:
                await self._publish()
                if self._saved_version < 0:
                    await self._save()  # whatever happens next, there is something to resume from
                while self.version < self._settings.total_steps:
                    await self._train_once()
            finally:
                await self._save()
            for helper in helpers:
                helper.cancel()

    async def _train_once(self) -> None:
        version = self.version
        with self._events.interval("wait_batch", version=version):
            groups = await self._coordinator.take_batch(version)
        with self._events.interval("train", version=version):
            result = await self._training.run(self._step, groups)
        if result.skipped is not None:
            path = self._set_aside(groups)
            raise UserError(f"step {version} was not taken: {result.skipped}; its batch is in {path}")
        await self._coordinator.step_completed(self.version, tuple(group.lease_id for group in groups))
        await self._publish()
        for observer in self._observers:
            observer.step_completed(self.version, groups, result)
        if self.version % self._checkpoint_every_steps == 0:
            await self._save()

    def _step(self, groups: tuple[Group, ...]) -> StepResult:
        return self._engine.step(build_batch(groups, self._settings, version=self._engine.version))

    async def _publish(self) -> None:
        """Copy the parameters out, between two steps; skipped, and done later, when every slot is being read."""
        slot = self._publisher.take_slot()
        if slot is None:
            self._late.set()
            return
        with self._events.interval("publish", num_bytes=self._publisher.num_bytes) as fields:
            fields["version"] = version = await self._training.run(self._copy_out, slot)
        await self._publisher.hand_over(slot, version)

    def _copy_out(self, slot: int) -> int:
        self._publisher.write(slot, self._engine.snapshot_tensors())
        return self._engine.version

    async def _publish_late(self) -> None:
        while True:
            await self._late.wait()
            await self._publisher.slot_free()
            self._late.clear()
            if self._publisher.newest_version < self.version:
                await self._publish()

    async def _announce_versions(self) -> None:
        async for version in self._publisher.ready_versions():
            await self._coordinator.published(version)
