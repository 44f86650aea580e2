"""CheckpointWriter: a checkpoint costs the training a copy; it is written, beside the next steps, by a thread."""

import asyncio

from common.events import EventLog
from common.lifecycle import DedicatedThread
from learner.checkpoint import CheckpointStore
from learner.coordinator.client import CoordinatorClient
from learner.training import TrainEngine, WriteState


class CheckpointWriter:
    """Writes one at a time. What belongs to a version, its frontier among it, is taken between the same two steps."""

    def __init__(
        self,
        *,
        model: str,
        engine: TrainEngine,
        training: DedicatedThread,
        coordinator: CoordinatorClient,
        checkpoints: CheckpointStore,
        events: EventLog,
    ) -> None:
        self._model = model
        self._engine = engine
        self._training = training
        self._coordinator = coordinator
        self._checkpoints = checkpoints
        self._events = events
        self._thread = DedicatedThread("checkpoints")
        self._writing: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Copy the state, to be called between two steps; waits for the checkpoint before this one to be whole.

        Whoever begins one awaits done() in the end: the writing is owned here, and outlives a cancellation.
        """
        await self.done()
        version = self._engine.version
        with self._events.interval("save", version=version):
            frontier = await self._coordinator.take_frontier()
            write = None if self._checkpoints.holds(version) else await self._training.run(self._engine.copy_state)
        self._writing = asyncio.ensure_future(self._write(version, frontier, write))

    async def done(self) -> None:
        """Returns when nothing is being written; raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    def check(self) -> None:
        """Raises what went wrong with the checkpoint that was being written, if it is known by now."""
        if self._writing is not None and self._writing.done():
            self._writing.result()

    async def _write(self, version: int, frontier: bytes, write: WriteState | None) -> None:
        with self._events.interval("write_checkpoint", version=version):
            if write is not None:
                await self._thread.run(
                    self._checkpoints.save, version=version, model=self._model, frontier=frontier, write_engine=write
                )
        # The coordinator may be some steps further: it forgets what this one covers, and nothing else.
        await self._coordinator.checkpoint_saved(version, frontier)
        self._events.emit("checkpoint", path=str(self._checkpoints.path_of(version)), version=version)

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.close()
