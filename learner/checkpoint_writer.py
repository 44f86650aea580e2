"""CheckpointWriter: a checkpoint costs the training a copy; it is written, beside the next steps, by a thread."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from common.events import EventLog
from common.lifecycle import DedicatedThread, UserError
from learner.checkpoint import CheckpointStore
from learner.coordinator.client import CoordinatorClient
from learner.training import TrainEngine, WriteState


@dataclass(frozen=True, slots=True)
class _Copy:
    """What belongs to a version, taken between the same two steps."""

    version: int
    frontier: bytes
    write: WriteState | None  # None: the checkpoint is there already
    whole: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class CheckpointWriter:
    """Writes one at a time, in the order in which they were begun."""

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
        self._copies: asyncio.Queue[_Copy] = asyncio.Queue(maxsize=1)
        self._newest: _Copy | None = None

    async def begin(self) -> None:
        """Copy the state, to be called between two steps; waits for the checkpoint before this one to be whole."""
        await self.done()
        version = self._engine.version
        with self._events.interval("save", version=version):
            frontier = await self._coordinator.take_frontier()
            write = None if self._checkpoints.holds(version) else await self._training.run(self._engine.copy_state)
        self._newest = _Copy(version, frontier, write)
        self._copies.put_nowait(self._newest)

    async def done(self) -> None:
        """Returns when nothing is being written; raises what went wrong with it."""
        newest, self._newest = self._newest, None
        if newest is not None:
            await newest.whole

    def check(self) -> None:
        """Raises what went wrong with the checkpoint that was being written, if it is known by now."""
        if self._newest is not None and self._newest.whole.done():
            self._newest.whole.result()

    async def write_all(self) -> None:
        """Writes what is begun, for as long as it runs."""
        while True:
            copy = await self._copies.get()
            try:
                await self._write(copy)
            except (OSError, RuntimeError, UserError) as error:  # a full disk, a rank that is gone
                copy.whole.set_exception(error)
                copy.whole.exception()  # seen: whoever waits, or comes to wait, is told
            else:
                copy.whole.set_result(None)

    async def _write(self, copy: _Copy) -> None:
        version, write = copy.version, copy.write
        if write is not None:
            with self._events.interval("write_checkpoint", version=version):
                await self._thread.run(
                    self._checkpoints.save,
                    version=version,
                    model=self._model,
                    frontier=copy.frontier,
                    write_engine=write,
                )
        # The coordinator may be some steps further: it forgets what this one covers, and nothing else.
        await self._coordinator.checkpoint_saved(version, copy.frontier)
        self._events.emit("checkpoint", path=str(self._checkpoints.path_of(version)), version=version)

    def close(self) -> None:
        """Waits for what the thread is writing."""
        self._thread.close()


@asynccontextmanager
async def writing_checkpoints(writer: CheckpointWriter) -> AsyncIterator[CheckpointWriter]:
    """It writes until the block ends, whatever ends that: what is saved on the way out is written too."""
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(writer.write_all())
            yield writer
            task.cancel()
    finally:
        writer.close()
