"""python:module:name: a function or a class of the user, run in worker processes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import Episode, Observation, Row, Said, StepResult
from rollout_server.environments.worker_pool import WorkerPool


class PythonCode:
    """A function makes a single-turn environment: `function(prompt: str, completion: str, row: Mapping) -> float`.

    `prompt` is the row's prompt; of chat messages, the content of the last one. `row` is the whole row.

    A class makes one of several turns, with an instance for each episode, made without arguments:

        reset(row, seed) -> observation          a text or chat messages; it may leave out row, seed or both
        step(text) -> (observation, reward, done)    or (observation, reward, terminated, truncated, info)
        close()                                  if there is something to free

    All may be sync or async. A worker runs sync code one call at a time, async code concurrently. A call that takes
    longer than settings.step_timeout_s fails, and so does one that raises, kills its process or returns no plausible
    number. A worker that is killed takes the episodes with it that it runs.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        scheme, _, target = url.partition(":")
        module, _, function = target.partition(":")
        if scheme != "python" or not module or not function.isidentifier():
            raise ValueError(f"{url!r} does not name a reward function or a class; write python:module:name")
        self.url = url
        self.settings = settings
        self._pool = WorkerPool(module, function, settings)

    def __repr__(self) -> str:
        return f"<PythonCode {self.url} {self._pool!r}>"

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator[Episode]:
        if not self._pool.has_episodes:
            yield OneTurn(row, self._pool)  # a function of its arguments alone: the seed is nothing to it
            return
        async with self._pool.episode(row.json, seed=seed) as episode:
            yield episode


class OneTurn:
    """Asks the function once."""

    def __init__(self, row: Row, pool: WorkerPool) -> None:
        self._row = row
        self._pool = pool

    async def reset(self) -> Observation:
        return self._row.prompt

    async def step(self, said: Said) -> StepResult:
        prompt = self._row.prompt
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return StepResult(reward=await self._pool.reward(text, said.text, self._row.json), done=True)
