"""agent:pull: agents ask the gateway for tasks themselves, as many at once as they like."""

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import EnvironmentFailure, Outcome, Row
from rollout_server.environments.scopes import Scopes

if TYPE_CHECKING:
    from rollout_server.gateway.session import Session

URL = "agent:pull"


class AgentPull:
    """An episode waits until an agent asks for it; then that agent has step_timeout_s from each answer to what it
    says next, because nothing else would tell that it has died."""

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError unless it is agent:pull, or agent:pull/QUEUE for one of several."""
        head, _, queue = url.partition("/")
        if head != URL or len(queue) > 128 or settings.replicas:
            raise ValueError(f"{url!r} must be {URL}, or {URL}/QUEUE where there are several, and has no replicas")
        self.url = url
        self.settings = settings
        self._queue = queue
        self._scopes = Scopes()

    def __repr__(self) -> str:
        return f"<AgentPull {self.url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._scopes.close()

    async def play(self, row: Row, session: "Session", *, seed: int) -> Outcome:
        """See AgentEnvironment."""
        invitation = session.invitation(row, seed=seed, timeout_s=self.settings.episode_timeout_s)
        waits_s = self.settings.capacity_timeout_s
        async with self._scopes.open():
            try:
                async with asyncio.timeout(waits_s):
                    await session.offers.offer(self._queue, invitation)
            except TimeoutError as error:
                reason = f"no agent asked for a task within {waits_s:g} s (capacity_timeout_s)"
                raise EnvironmentFailure("environment_unavailable", reason) from error
            await self._until_ended(session)
        return session.outcome()

    async def _until_ended(self, session: "Session") -> None:
        limit_s = self.settings.step_timeout_s
        session.note_activity()
        while (left_s := limit_s - session.idle_s) > 0:
            try:
                async with asyncio.timeout(left_s):
                    return await session.ended()
            except TimeoutError:
                continue  # it may have spoken meanwhile
        reason = f"the agent said nothing for {limit_s:g} s (step_timeout_s), and did not end its session"
        raise EnvironmentFailure("environment_timeout", reason)
