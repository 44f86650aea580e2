"""verifiers+tcp://host:port: a verifiers environment server, whose agent plays the episode through the gateway."""

import asyncio
import random
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from common.environments import EnvironmentSettings
from common.wire.foreign import ConnectionBroken
from rollout_server.environments.environment import BadRow, EnvironmentFailure, Outcome, Row
from rollout_server.environments.health import retry_delay_s
from rollout_server.environments.replicas import least_busy, place_at
from rollout_server.environments.scopes import Scopes
from rollout_server.environments.verifiers_episode import Record, run_request
from rollout_server.environments.verifiers_server import VerifiersServer

if TYPE_CHECKING:
    from rollout_server.gateway.session import Session


class VerifiersTcp:
    """The server is sent the row as a task, and where its session of the gateway is; its rewards come back.

    A run that is lost is repeated while the agent has asked the policy for nothing.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        self.url = url
        self.settings = settings
        self._servers = [VerifiersServer(each, settings) for each in (url, *settings.replicas)]
        self._scopes = Scopes()
        self._stack = AsyncExitStack()
        self._random = random.Random()

    def __repr__(self) -> str:
        return f"<VerifiersTcp {self.url}, {self._servers}>"

    async def __aenter__(self) -> Self:
        for server in self._servers:
            await self._stack.enter_async_context(server)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._scopes.close()
        await self._stack.aclose()

    async def play(self, row: Row, session: "Session", *, seed: int) -> Outcome:
        """See AgentEnvironment. The server has no use for the seed: the row says what the task is."""
        del seed
        payload = run_request(row, session)
        deadline = asyncio.get_running_loop().time() + self.settings.capacity_timeout_s
        async with self._scopes.open():
            for tries in range(1, self.settings.tries + 1):
                server = await least_busy(self._servers, deadline=deadline)
                try:
                    return await self._run(server, payload, session, deadline)
                except ConnectionBroken as error:
                    if session.has_begun:
                        raise EnvironmentFailure("environment_error", f"{error}, in the middle") from error
                    if tries == self.settings.tries:
                        raise EnvironmentFailure("environment_unavailable", str(error)) from error
                await asyncio.sleep(retry_delay_s(tries, self._random))
        raise AssertionError("the last try returns or raises")

    async def _run(self, server: VerifiersServer, payload: bytes, session: "Session", deadline: float) -> Outcome:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        record = Record()
        try:
            async with place_at(server, server.address, self.settings, deadline=deadline):
                sent_at = loop.time()
                await server.check(timeout_s=self.settings.step_timeout_s)
                server.health.note_success(loop.time())
                outcome = record.outcome(await server.run(payload, record.add), session)
        except (asyncio.CancelledError, EnvironmentFailure, BadRow):
            server.health.note_nothing()
            raise
        except ConnectionBroken as error:
            server.health.note_failure(str(error), loop.time(), sent_at=sent_at)
            raise
        return outcome
