"""hf-reward:NAME_OR_DIRECTORY: a Hugging Face reward model, run in worker processes beside the engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import Episode, Row
from rollout_server.environments.python_code import OneTurn
from rollout_server.environments.worker_pool import WorkerPool

SCHEME = "hf-reward"
WORKER_MODULE, WORKER_CLASS = "rollout_server.environments.reward_model", "RewardModel"


class HfReward:
    """Single-turn: what the model says of prompt and completion together, calls that wait at once in one batch.

    It runs where the trajectory is finished, so that no reward is computed twice and the learner's step waits for none;
    in processes of its own, on the CPU: the engine owns the accelerator. A large one is served, and asked over
    reward+http. All guards of rewards in worker processes hold for it: see PythonCode.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        scheme, _, model = url.partition(":")
        if scheme != SCHEME or not model.strip():
            raise ValueError(f"{url!r} names no reward model; write {SCHEME}:NAME or {SCHEME}:DIRECTORY")
        self.url = url
        self.settings = settings
        arguments = (model, str(settings.max_batch))
        self._pool = WorkerPool(WORKER_MODULE, WORKER_CLASS, settings, arguments=arguments, title=url)

    def __repr__(self) -> str:
        return f"<HfReward {self.url} {self._pool!r}>"

    async def __aenter__(self) -> Self:
        """Raises EnvironmentStartError for what is no reward model."""
        await self._pool.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pool.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator[Episode]:
        del seed  # the score of a text is one number
        yield OneTurn(row, self._pool)
