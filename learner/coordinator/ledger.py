"""TaskLedger: which task is leased next, which were given back, which are parked, and what a checkpoint keeps of it.

A task is a number; tasks.py makes its row and seed from the number alone. So what a resume needs to skip no prompt
and repeat none is small: the first number never handed out, and the numbers handed out but not trained.
"""

import heapq
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from learner.coordinator.mix import Mix

MAX_FRONTIER_BYTES = 1 << 20
MAX_WAITING_TASKS = 1 << 14  # for environments that are down; a frontier has room for more
MAX_PARKED_REASONS = 100
MAX_REASON_LENGTH = 200

Natural = Annotated[int, Meta(ge=0, lt=1 << 53)]


class FrontierError(ValueError):
    """What a checkpoint holds of the coordinator cannot be used."""


class OpenTask(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A task that was handed out, or given back, and is not trained."""

    task_id: Natural
    failures: Natural = 0
    losses: Natural = 0  # how often its server was lost
    requeues: Natural = 0  # how often it was given up because it took too long


class PastLeases(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The leases of the run so far, and how they ended."""

    leased: Natural = 0
    next_lease_id: Natural = 0
    trained: Natural = 0
    failed: dict[str, Natural] = {}
    cancelled: dict[str, Natural] = {}
    expired: Natural = 0
    refused: dict[str, Natural] = {}


class FrontierState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a checkpoint taken at policy version `version` holds of the coordinator."""

    format: Literal[1] = 1
    version: Natural
    source: str  # names the data source and its seed: task numbers mean nothing under another
    next_task_id: Natural
    open_tasks: tuple[OpenTask, ...]
    parked: dict[Natural, str]  # task -> reason
    past: PastLeases

    def __post_init__(self) -> None:
        open_ids = [task.task_id for task in self.open_tasks]
        if len(set(open_ids)) != len(open_ids) or not self.parked.keys().isdisjoint(open_ids):
            raise ValueError("a task is listed twice")
        if any(task_id >= self.next_task_id for task_id in (*open_ids, *self.parked)):
            raise ValueError(f"a task is listed that was never handed out; the next one is {self.next_task_id}")


def encode_frontier(state: FrontierState) -> bytes:
    """JSON. Raises FrontierError when it would not fit into a message."""
    data = msgspec.json.encode(state)
    if len(data) > MAX_FRONTIER_BYTES:
        raise FrontierError(
            f"the frontier has {len(data)} bytes, at most {MAX_FRONTIER_BYTES} fit: {len(state.open_tasks)} open and "
            f"{len(state.parked)} parked tasks; find out why so many tasks fail"
        )
    return data


_decoder = msgspec.json.Decoder(FrontierState)


def decode_frontier(data: bytes, *, version: int, source: str) -> FrontierState:
    """The frontier of a checkpoint over the data `source`, or the beginning if there is none.

    Raises FrontierError when it is not one, or is of a later version than the learner's.
    """
    if not data:
        return FrontierState(version=0, source=source, next_task_id=0, open_tasks=(), parked={}, past=PastLeases())
    try:
        state = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise FrontierError(f"the checkpoint's frontier is damaged: {error}") from error
    if state.version > version:
        raise FrontierError(f"the frontier was taken at version {state.version}, the learner is at {version}")
    if state.source != source:
        raise FrontierError(
            f"the checkpoint was trained on {state.source!r}, the run is configured for {source!r}: tasks would be "
            "skipped and repeated; resume with the same data and seed, or start a new run from the weights"
        )
    return state


class TaskLedger:
    """Hands out every task once, and again when it is given back: the oldest first, so that none starves."""

    def __init__(self, *, max_failures: int, max_losses: int, mix: Mix | None = None) -> None:
        self.max_failures = max_failures
        self.max_losses = max_losses
        self.mix = mix or Mix()
        self.next_task_id = 0
        self.parked: dict[int, str] = {}
        self._again: list[int] = []  # heap: given back, leased before anything new
        self._later: deque[int] = deque()  # failed while everything failed: leased alternately with new ones
        self._waiting: defaultdict[int, deque[int]] = defaultdict(deque)  # for their environment to be up again
        self._take_later = False
        self._trouble: dict[int, OpenTask] = {}  # tasks with failures or losses

    def next(self, may_run: Callable[[int], bool] = lambda environment: True) -> int | None:
        """The task to lease now, of an environment that may run; those of others are kept until theirs may.

        None when no environment may run, or MAX_WAITING_TASKS wait: then the run waits for their environments.
        """
        allowed = {environment for environment in range(self.mix.num_environments) if may_run(environment)}
        while allowed and self.num_waiting <= MAX_WAITING_TASKS:
            task_id = self._draw(allowed)
            if self.mix.environment_of(task_id) in allowed:
                return task_id
            self.keep_waiting(task_id)
        return self._waiting_for(allowed).popleft() if self._waiting_for(allowed) else None

    def _draw(self, allowed: set[int]) -> int:
        if self._again:
            return heapq.heappop(self._again)
        delayed = self._later or self._waiting_for(allowed)
        self._take_later = not self._take_later and bool(delayed)
        if self._take_later:
            return delayed.popleft()
        self.next_task_id += 1
        return self.next_task_id - 1

    def _waiting_for(self, allowed: set[int]) -> deque[int]:
        """Tasks that waited for one of these environments."""
        return next((self._waiting[each] for each in sorted(allowed) if self._waiting.get(each)), deque())

    @property
    def num_waiting(self) -> int:
        return sum(map(len, self._waiting.values()))

    def keep_waiting(self, task_id: int) -> None:
        """The task's environment is down: nothing is counted against it, and it is leased when that is up again."""
        self._waiting[self.mix.environment_of(task_id)].append(task_id)

    def claim(self, task_id: int, *, at_most_ahead: int) -> bool:
        """Take this very task, if it is to be leased; one that was never handed out only if it soon would be."""
        for waiting in (self._again, self._later, *self._waiting.values()):
            if task_id in waiting:
                waiting.remove(task_id)
                heapq.heapify(self._again)
                return True
        if not self.next_task_id <= task_id < self.next_task_id + at_most_ahead:
            return False
        for skipped in range(self.next_task_id, task_id):
            self.give_back(skipped)
        self.next_task_id = task_id + 1
        return True

    def give_back(self, task_id: int) -> None:
        """The lease ended for a reason that says nothing about the task."""
        heapq.heappush(self._again, task_id)

    def postpone(self, task_id: int) -> None:
        """The task failed like everything else does: nothing is counted against it, and others are tried meanwhile."""
        self._later.append(task_id)

    def failed(self, task_id: int, reason: str) -> bool:
        """The task failed. True: too often, it is parked."""
        task = self._of(task_id)
        return self._again_or_park(OpenTask(task_id, task.failures + 1, task.losses, task.requeues), reason)

    def lost(self, task_id: int, reason: str) -> bool:
        """The task's server was lost. True: too often, it is parked, for it may be what kills servers."""
        task = self._of(task_id)
        return self._again_or_park(OpenTask(task_id, task.failures, task.losses + 1, task.requeues), reason)

    def requeued(self, task_id: int) -> None:
        """The task took too long for the groups beside it: it begins again."""
        task = self._of(task_id)
        self._trouble[task_id] = OpenTask(task_id, task.failures, task.losses, task.requeues + 1)
        self.give_back(task_id)

    def requeues(self, task_id: int) -> int:
        return self._of(task_id).requeues

    def done(self, task_id: int) -> None:
        """It is not leased again."""
        self._trouble.pop(task_id, None)

    def _of(self, task_id: int) -> OpenTask:
        return self._trouble.get(task_id, OpenTask(task_id))

    def _again_or_park(self, task: OpenTask, reason: str) -> bool:
        if task.failures < self.max_failures and task.losses < self.max_losses:
            self._trouble[task.task_id] = task
            self.give_back(task.task_id)
            return False
        self._trouble.pop(task.task_id, None)
        self.parked[task.task_id] = reason[:MAX_REASON_LENGTH]
        if len(self.parked) > MAX_PARKED_REASONS:
            self.parked[list(self.parked)[-MAX_PARKED_REASONS - 1]] = ""
        return True

    def given_back(self) -> tuple[int, ...]:
        """Tasks that wait to be leased again, the oldest first."""
        waiting = (task_id for tasks in self._waiting.values() for task_id in tasks)
        return tuple(sorted([*self._again, *self._later, *waiting]))

    def open_tasks(self, leased: tuple[int, ...]) -> tuple[OpenTask, ...]:
        """Everything handed out and not trained, given the tasks that are leased now; the oldest first."""
        return tuple(self._of(task_id) for task_id in sorted([*leased, *self.given_back()]))

    def restore(self, state: FrontierState) -> None:
        """Go on where the checkpoint was taken: what was open then is leased before anything new."""
        self.next_task_id = state.next_task_id
        self.parked = dict(state.parked)
        self._trouble = {task.task_id: task for task in state.open_tasks if task != OpenTask(task.task_id)}
        self._again = [task.task_id for task in state.open_tasks]
        heapq.heapify(self._again)

    def __repr__(self) -> str:
        again = len(self._again) + len(self._later)
        waiting = f", {self.num_waiting} waiting for their environment" if self.num_waiting else ""
        return f"<TaskLedger next task {self.next_task_id}, {again} to lease again, {len(self.parked)} parked{waiting}>"
