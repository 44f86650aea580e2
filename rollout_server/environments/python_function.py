"""python:module:function: a single-turn environment whose reward is computed by a function of the user."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import Episode, Observation, Row, Said, StepResult
from rollout_server.environments.worker_pool import WorkerPool


class PythonFunction:
    """Calls `function(prompt: str, completion: str, row: Mapping) -> float`, sync or async, in worker processes.

    `prompt` is the row's prompt; of chat messages, the content of the last one. `row` is the whole row. A sync
    function runs one call at a time in each worker, an async one many. A call that takes longer than
    settings.step_timeout_s fails, and so does one that raises, kills its process or returns no plausible number.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        scheme, _, target = url.partition(":")
        module, _, function = target.partition(":")
        if scheme != "python" or not module or not function.isidentifier():
            raise ValueError(f"{url!r} does not name a reward function; write python:module:function")
        self.url = url
        self.settings = settings
        self._pool = WorkerPool(module, function, settings)

    def __repr__(self) -> str:
        return f"<PythonFunction {self.url} {self._pool!r}>"

    async def __aenter__(self) -> Self:
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator[Episode]:
        del seed  # a function of its arguments alone
        yield _OneTurn(row, self._pool)


class _OneTurn:
    def __init__(self, row: Row, pool: WorkerPool) -> None:
        self._row = row
        self._pool = pool

    async def reset(self) -> Observation:
        return self._row.prompt

    async def step(self, said: Said) -> StepResult:
        prompt = self._row.prompt
        text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        return StepResult(reward=await self._pool.reward(text, said.text, self._row.json), done=True)
