"""reward+http://host:port/path: a reward model behind the HTTP request that OpenRLHF sends to its reward servers."""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import (
    EnvironmentFailure,
    Episode,
    FailureKind,
    Observation,
    Row,
    Said,
    StepResult,
)
from rollout_server.environments.health import Health, retry_delay_s
from rollout_server.environments.http_server import HttpFailure, HttpServer
from rollout_server.environments.reward_request import Question, read_rewards, request_body

PREFIX = "reward+"
REQUESTS_PER_REPLICA = 8  # at once; what comes meanwhile goes together in the next
REACHED_IS_REACHABLE_S = 1.0
CLOSED = "the environment was closed"

_KINDS: Mapping[str, FailureKind] = {
    "unreachable": "environment_unavailable",
    "unusable": "environment_unavailable",
    "timeout": "environment_timeout",
}


class Replica:
    """One server of the environment."""

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        if not url.startswith(PREFIX):
            raise ValueError(f"{url!r} is no replica of a reward model; write reward+http://HOST:PORT/PATH")
        self.server = HttpServer(url.removeprefix(PREFIX), max_reply_bytes=settings.max_reply_bytes)
        self.health = Health()
        self.num_running = 0

    def __repr__(self) -> str:
        return f"<Replica {self.server.url}, {self.num_running} requests, {self.health!r}>"


class RewardHttp:
    """Single-turn: the completion goes to the least busy server of several, together with others that wait.

    A request that fails is repeated, at another server if there is one; its completions then go one by one, so that
    one that the server cannot stand fails alone. An episode does not begin while no server can be reached.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        self.url = url
        self.settings = settings
        self._replicas = [Replica(each, settings) for each in (url, *settings.replicas)]
        self._places = asyncio.Semaphore(settings.max_concurrent)
        self._queue: deque[Question] = deque()
        self._dispatch_is_due = False
        self._is_closed = False
        self._random = random.Random()
        self._open: set[Question] = set()
        self._checking = asyncio.Lock()
        self._reached_at = -math.inf
        self._stack = AsyncExitStack()
        self._requests = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<RewardHttp {self.url}, {len(self._queue)} queued, {self._replicas}>"

    async def __aenter__(self) -> Self:
        for replica in self._replicas:
            await self._stack.enter_async_context(replica.server)
        await self._requests.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        for task in self._running:
            task.cancel()
        for question in self._open:
            question.fail("environment_error", CLOSED)
        cancelled = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
        try:
            await self._requests.__aexit__(*cancelled)
        finally:
            await self._stack.aclose()

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator[Episode]:
        del seed  # the server sees the text alone
        yield _OneTurn(row, self)

    async def check_up(self) -> None:
        """Raises EnvironmentFailure when no server is worth sampling for: it costs nothing to find that out before."""
        if any(replica.health.is_proven for replica in self._replicas):
            return
        async with self._checking:
            loop = asyncio.get_running_loop()
            for replica in self._replicas:
                if replica.health.pause_s(loop.time()) == 0 and loop.time() > self._reached_at + REACHED_IS_REACHABLE_S:
                    await self._connect(replica)
        if loop.time() > self._reached_at + REACHED_IS_REACHABLE_S:
            reasons = "; ".join(replica.health.last_failure for replica in self._replicas)
            raise EnvironmentFailure("environment_unavailable", reasons)

    async def _connect(self, replica: Replica) -> None:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            await replica.server.connect(timeout_s=self.settings.step_timeout_s)
            self._reached_at = loop.time()
        except HttpFailure as failure:
            replica.health.note_failure(failure.reason, loop.time(), sent_at=sent_at)

    async def reward(self, query: str, prompt: str, label: object) -> float:
        """Raises EnvironmentFailure. settings.step_timeout_s counts from when the completion may be sent."""
        timeout_s = self.settings.step_timeout_s
        async with self._places:
            question = Question(query, prompt, label, asyncio.get_running_loop().create_future())
            self._open.add(question)
            self._put(question)
            try:
                async with asyncio.timeout(timeout_s):
                    return await question.reward
            except TimeoutError as error:
                raise self._too_late() from error
            finally:
                self._open.discard(question)
                question.reward.cancel()

    def _too_late(self) -> EnvironmentFailure:
        reason = f"no reward within {self.settings.step_timeout_s:g} s"
        if all(replica.health.is_open for replica in self._replicas):
            reasons = "; ".join(replica.health.last_failure for replica in self._replicas)
            return EnvironmentFailure("environment_unavailable", f"{reason}; {reasons}")
        return EnvironmentFailure("environment_timeout", reason)

    # --- from the queue to the servers: plain code, run once per turn of the event loop -------------------------------

    def _put(self, question: Question) -> None:
        if self._is_closed:
            question.fail("environment_error", CLOSED)
        elif not question.reward.done():
            self._queue.append(question)
            self._dispatch_soon()

    def _dispatch_soon(self) -> None:
        if not self._dispatch_is_due:
            self._dispatch_is_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_is_due = False
        now = asyncio.get_running_loop().time()
        while self._queue and not self._is_closed:
            free = [one for one in self._replicas if one.num_running < REQUESTS_PER_REPLICA]
            for replica in sorted(free, key=lambda one: (one.health.failures_in_a_row, one.num_running)):
                if batch := self._batch(replica, now):
                    self._start(replica, batch)
                    break
            else:
                break
        if self._queue and (pause_s := min(replica.health.pause_s(now) for replica in self._replicas)) > 0:
            asyncio.get_running_loop().call_later(pause_s, self._dispatch_soon)

    def _batch(self, replica: Replica, now: float) -> list[Question]:
        """What goes to the replica next; nothing if it takes nothing now."""
        while self._queue and self._queue[0].reward.done():
            self._queue.popleft()
        if not self._queue or not replica.health.admit(now):
            return []
        batch = [self._queue.popleft()]
        if batch[0].tries == 0 and replica.health.is_proven:
            while self._queue and len(batch) < self.settings.max_batch and self._queue[0].tries == 0:
                batch.append(self._queue.popleft())
        return [question for question in batch if not question.reward.done()]

    def _start(self, replica: Replica, batch: list[Question]) -> None:
        replica.num_running += 1
        task = self._requests.create_task(self._ask(replica, batch))
        self._running.add(task)
        task.add_done_callback(partial(self._finish, replica))

    def _finish(self, replica: Replica, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        replica.num_running -= 1
        self._dispatch_soon()

    async def _ask(self, replica: Replica, batch: list[Question]) -> None:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            content = await replica.server.post_json(request_body(batch), timeout_s=self._timeout_s(batch))
            rewards = read_rewards(content, expected=len(batch))
        except HttpFailure as failure:
            if failure.kind in _KINDS:
                replica.health.note_failure(failure.reason, loop.time(), sent_at=sent_at)
            else:
                replica.health.note_success(loop.time())  # it is up, and does not want this
            self._again(batch, _KINDS.get(failure.kind, "environment_error"), failure.reason)
        except asyncio.CancelledError:
            replica.health.note_nothing()
            raise
        except EnvironmentFailure as failure:
            replica.health.note_success(loop.time())
            self._again(batch, failure.kind, f"{replica.server.url}: {failure.reason}")
        else:
            replica.health.note_success(loop.time())
            for question, reward in zip(batch, rewards, strict=True):
                question.settle(reward)

    def _timeout_s(self, batch: list[Question]) -> float:
        """One completion that a server chokes on takes no more than half of the time of those sent with it."""
        return self.settings.step_timeout_s / (2 if len(batch) > 1 else 1)

    def _again(self, batch: list[Question], kind: FailureKind, reason: str) -> None:
        for question in batch:
            question.tries += 1
            is_final = kind == "environment_error" and len(batch) == 1
            if is_final or question.tries >= self.settings.tries:
                question.fail(kind, reason)
            else:
                # What came in a batch may be sound, and be held up by one that is not: its turn comes at once.
                delay_s = retry_delay_s(question.tries, self._random) if len(batch) == 1 else 0.0
                asyncio.get_running_loop().call_later(delay_s, self._put, question)


class _OneTurn:
    def __init__(self, row: Row, environment: RewardHttp) -> None:
        self._row = row
        self._environment = environment

    async def reset(self) -> Observation:
        await self._environment.check_up()
        return self._row.prompt

    async def step(self, said: Said) -> StepResult:
        label = self._row.fields.get("label", "")
        reward = await self._environment.reward(said.read_all(), said.read_prompt(), label)
        return StepResult(reward=reward, done=True)
