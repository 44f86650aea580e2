"""WorkerPool: calls of a user's function or class, run in a few worker processes that may hang or die at any time."""

import asyncio
import itertools
import logging
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import msgspec

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import (
    EnvironmentFailure,
    EnvironmentStartError,
    Observation,
    Said,
    StepResult,
)
from rollout_server.environments.frames import Call, Outcome
from rollout_server.environments.worker_process import PendingCall, WorkerCode, WorkerProcess

RESTART_PAUSE_S = 1.0
EPISODE_DIED = "the worker process that ran the episode died"

_log = logging.getLogger(__name__)


class WorkerPool:
    """Calls wait in one queue for the least busy worker. A worker is started when there are more calls than workers."""

    def __init__(
        self,
        module: str,
        function: str,
        settings: EnvironmentSettings,
        *,
        arguments: Sequence[str] = (),
        title: str = "",
    ) -> None:
        """arguments: function(*arguments), in the worker, is what answers the calls. title: its name for people."""
        self._code = WorkerCode(module, function, tuple(arguments), title)
        self._settings = settings
        self._places = asyncio.Semaphore(settings.max_concurrent)
        self._ids = itertools.count()
        self._queue: OrderedDict[int, PendingCall] = OrderedDict()
        self._workers: list[WorkerProcess] = []
        self._num_starting = 0
        self._work_left = asyncio.Event()
        self._dispatch_is_due = False
        self._keepers = asyncio.TaskGroup()
        self.has_episodes = False  # known once entered
        self._keeper_tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<WorkerPool {self._code}, {len(self._queue)} calls queued, workers {self._workers}>"

    async def __aenter__(self) -> Self:
        """Starts the first worker; raises EnvironmentStartError when the function cannot be used."""
        first = await self._start_worker()
        self.has_episodes = first.has_episodes
        await self._keepers.__aenter__()
        for index in range(self._settings.workers):
            keeper = self._keepers.create_task(self._keep_worker(first if index == 0 else None))
            self._keeper_tasks.append(keeper)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for keeper in self._keeper_tasks:
            keeper.cancel()
        # The body's own error is not one of the keepers', so only a cancellation is told to their group.
        cancelled = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
        try:
            await self._keepers.__aexit__(*cancelled)
        finally:
            for worker in self._workers:
                worker.kill()
            for worker in self._workers:
                self._queue.update((pending.call.call_id, pending) for pending in await worker.death())
            self._fail_queued("the environment was closed")

    async def reward(self, prompt: str, completion: str, row_json: bytes) -> float:
        """Raises EnvironmentFailure. Waits for its turn when settings.max_concurrent calls are under way."""
        async with self._places:
            outcome = await self._queued(self._pending(row_json, prompt=prompt, completion=completion))
        assert outcome.reward is not None
        return outcome.reward

    @asynccontextmanager
    async def episode(self, row_json: bytes, *, seed: int) -> AsyncIterator["WorkerEpisode"]:
        """An instance of the user's class in one of the workers; ends with the block."""
        pending = self._pending(row_json, verb="reset", episode_id=next(self._ids), seed=seed)
        try:
            yield WorkerEpisode(self, pending)
        finally:
            if pending.worker is not None:
                pending.worker.end_episode(pending.call.episode_id)
                pending.worker.num_episodes -= 1

    async def reset(self, pending: PendingCall) -> Outcome:
        """The first call of an episode, run by whichever worker is least busy; pending.worker is that one."""
        async with self._places:
            return await self._queued(pending)

    async def step(self, worker: WorkerProcess, episode_id: int, completion: str) -> Outcome:
        """Raises EnvironmentFailure, also when the worker that has the episode is gone."""
        pending = self._pending(b"null", verb="step", episode_id=episode_id, completion=completion)
        async with self._places:
            if worker.is_dying:
                raise EnvironmentFailure("environment_error", EPISODE_DIED)
            worker.send([pending])
            return await pending.outcome

    def _pending(self, row_json: bytes, *, prompt: str = "", completion: str = "", **fields: Any) -> PendingCall:
        call = Call(next(self._ids), prompt, completion, msgspec.Raw(row_json), **fields)
        return PendingCall(call, asyncio.get_running_loop().create_future())

    async def _queued(self, pending: PendingCall) -> Outcome:
        self._queue[pending.call.call_id] = pending
        self._dispatch_soon()
        try:
            return await pending.outcome
        finally:
            self._queue.pop(pending.call.call_id, None)

    # --- from the queue to the workers: plain code, run once per turn of the event loop -----------------------------

    def _dispatch_soon(self) -> None:
        if not self._dispatch_is_due:
            self._dispatch_is_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        """Hand out queued calls, in batches, as far as the workers have room."""
        self._dispatch_is_due = False
        shares: defaultdict[WorkerProcess, list[PendingCall]] = defaultdict(list)
        while self._queue:
            free = [worker for worker in self._workers if worker.has_room_beside(len(shares[worker]))]
            if not free:
                break
            worker = min(free, key=lambda worker: (worker.num_in_flight + len(shares[worker]), worker.num_episodes))
            shares[worker].append(self._queue.popitem(last=False)[1])
        for worker, share in shares.items():
            if share:
                worker.send(share)
                worker.num_episodes += sum(pending.call.verb == "reset" for pending in share)
        if self._wants_worker():
            self._work_left.set()

    def _wants_worker(self) -> bool:
        unanswered = len(self._queue) + sum(worker.num_in_flight for worker in self._workers)
        num_episodes = sum(worker.num_episodes for worker in self._workers)
        return max(unanswered, num_episodes) > len(self._workers) + self._num_starting

    # --- keeping the workers alive ------------------------------------------------------------------------------------

    async def _start_worker(self) -> WorkerProcess:
        self._num_starting += 1
        try:
            worker = await WorkerProcess.start(self._code, self._settings, self._dispatch_soon)
        finally:
            self._num_starting -= 1
        self._workers.append(worker)
        return worker

    async def _keep_worker(self, worker: WorkerProcess | None) -> None:
        """One place for a worker: fills it whenever there is work for it, and again after each death."""
        while True:
            if worker is not None:
                await self._mourn(worker)
            while not self._wants_worker():
                self._work_left.clear()
                await self._work_left.wait()
            worker = await self._restart_worker()

    async def _mourn(self, worker: WorkerProcess) -> None:
        self._dispatch_soon()
        unstarted = await worker.death()
        self._workers.remove(worker)
        _log.warning("a worker of %s ended: %s", self._code, worker.cause_of_death)
        for pending in reversed(unstarted):
            if pending.call.verb == "step":  # the process had the state of the episode
                pending.fail(EnvironmentFailure("environment_error", EPISODE_DIED))
            elif not pending.outcome.done():
                self._queue[pending.call.call_id] = pending
                self._queue.move_to_end(pending.call.call_id, last=False)
        self._dispatch_soon()

    async def _restart_worker(self) -> WorkerProcess | None:
        try:
            return await self._start_worker()
        except EnvironmentStartError as error:
            _log.error("%s", error)
            if not self._workers:
                self._fail_queued(str(error))
            await asyncio.sleep(RESTART_PAUSE_S)
            return None

    def _fail_queued(self, reason: str) -> None:
        for pending in self._queue.values():
            pending.fail(EnvironmentFailure("environment_error", reason))


class WorkerEpisode:
    """An Episode that is run by a worker."""

    def __init__(self, pool: WorkerPool, pending: PendingCall) -> None:
        self._pool = pool
        self._pending = pending

    async def reset(self) -> Observation:
        return (await self._pool.reset(self._pending)).observation

    async def step(self, said: Said) -> StepResult:
        worker = self._pending.worker
        assert worker is not None, "reset comes first"
        outcome = await self._pool.step(worker, self._pending.call.episode_id, said.text)
        assert outcome.reward is not None
        return StepResult(
            reward=outcome.reward, done=outcome.done, truncated=outcome.truncated, observation=outcome.observation
        )
