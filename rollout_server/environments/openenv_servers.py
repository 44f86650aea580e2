"""OpenEnvServers: where an episode of an OpenEnv environment begins, of one or several servers of it."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from types import TracebackType
from typing import Any, Self

from common.environments import EnvironmentSettings
from rollout_server.environments.capacity import Capacity
from rollout_server.environments.environment import EnvironmentFailure, FailureKind
from rollout_server.environments.health import Health, retry_delay_s
from rollout_server.environments.http_server import HttpFailure, HttpServer
from rollout_server.environments.openenv_session import Session, SessionFailure, open_session
from rollout_server.environments.replicas import least_busy

PREFIX = "openenv+"
CONNECT_TIMEOUT_S = 10.0

_KINDS: Mapping[str, FailureKind] = {
    "unreachable": "environment_unavailable",
    "unusable": "environment_unavailable",
    "full": "environment_unavailable",
    "timeout": "environment_timeout",
}
_AGAIN = ("unreachable", "full", "lost")  # at a reset: nothing has been sampled yet
_UNWELL = ("unreachable", "unusable", "timeout", "lost")

Begun = tuple[AsyncExitStack, Session, dict[str, Any]]
"""What ends the session, the session, and the data of the answer to its reset."""


class Replica:
    """One server of the environment."""

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        scheme, separator, place = url.removeprefix(PREFIX).partition("://")
        if not url.startswith(PREFIX) or not separator or scheme not in ("ws", "wss"):
            raise ValueError(f"{url!r} must look like openenv+ws://HOST:PORT")
        place = place.rstrip("/")
        self.socket_url = f"{scheme}://{place}/ws"
        http = "https" if scheme == "wss" else "http"
        self.schema_server = HttpServer(f"{http}://{place}/schema", max_reply_bytes=settings.max_reply_bytes)
        self.health = Health()
        self.capacity = Capacity(settings.max_concurrent)

    def __repr__(self) -> str:
        return f"<Replica {self.socket_url}, {self.capacity!r}, {self.health!r}>"


class OpenEnvServers:
    """Waits while all are full, fails at once while all are down, and repeats what is no server's last word."""

    def __init__(self, replicas: list[Replica], settings: EnvironmentSettings) -> None:
        self.settings = settings
        self._replicas = replicas
        self._random = random.Random()
        self._sessions: set[Session] = set()
        self._is_closed = False
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return repr(self._replicas)

    async def __aenter__(self) -> Self:
        for replica in self._replicas:
            await self._stack.enter_async_context(replica.schema_server)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closed = True
        for session in self._sessions:
            session.abort()
        await self._stack.aclose()

    async def schemas(self) -> bytes:
        """What GET /schema says. Raises EnvironmentFailure."""
        loop = asyncio.get_running_loop()
        replica = await least_busy(self._replicas, deadline=loop.time() + self.settings.step_timeout_s)
        sent_at = loop.time()
        try:
            content = await replica.schema_server.get(timeout_s=self.settings.step_timeout_s)
        except asyncio.CancelledError:
            replica.health.note_nothing()
            raise
        except HttpFailure as failure:
            replica.health.note_failure(failure.reason, loop.time(), sent_at=sent_at)
            raise EnvironmentFailure("environment_unavailable", failure.reason) from failure
        replica.health.note_success(loop.time())
        return content

    async def begin(self, data: Mapping[str, Any]) -> Begun:
        """A new session, reset with these data. Raises EnvironmentFailure."""
        deadline = asyncio.get_running_loop().time() + self.settings.capacity_timeout_s
        tries = 0
        while True:
            replica = await least_busy(self._replicas, deadline=deadline)
            try:
                return await self._try(replica, data, deadline)
            except SessionFailure as failure:
                tries += failure.kind != "full"
                late = asyncio.get_running_loop().time() >= deadline
                if failure.kind not in _AGAIN or tries >= self.settings.tries or late:
                    kind = _KINDS.get(failure.kind, "environment_error")
                    raise EnvironmentFailure(kind, failure.reason) from failure
            await asyncio.sleep(retry_delay_s(max(1, tries), self._random))

    async def _try(self, replica: Replica, data: Mapping[str, Any], deadline: float) -> Begun:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            async with AsyncExitStack() as stack:
                await self._wait_for_slot(replica, stack, deadline)
                sent_at = loop.time()
                session, reply = await self._reset(replica, stack, data)
                replica.health.note_success(loop.time())
                return stack.pop_all(), session, reply
        except asyncio.CancelledError:
            replica.health.note_nothing()
            raise
        except SessionFailure as failure:
            if failure.kind in _UNWELL:
                replica.health.note_failure(failure.reason, loop.time(), sent_at=sent_at)
            else:
                replica.health.note_success(loop.time())
            raise

    async def _wait_for_slot(self, replica: Replica, stack: AsyncExitStack, deadline: float) -> None:
        try:
            timeout_s = max(0.0, deadline - asyncio.get_running_loop().time())
            await stack.enter_async_context(replica.capacity.slot(timeout_s=timeout_s))
        except TimeoutError as error:
            waited = f"no session became free within {self.settings.capacity_timeout_s:g} s: capacity_timeout_s"
            raise SessionFailure("full", f"{replica.socket_url}: {waited}") from error

    async def _reset(
        self, replica: Replica, stack: AsyncExitStack, data: Mapping[str, Any]
    ) -> tuple[Session, dict[str, Any]]:
        loop = asyncio.get_running_loop()
        try:
            session = await stack.enter_async_context(self._session(replica))
            self._keep(session, stack)
            timeout_s = self.settings.step_timeout_s
            reply = await session.request("reset", data, answer="observation", timeout_s=timeout_s)
        except SessionFailure as failure:
            if failure.kind == "full":
                replica.capacity.note_full(loop.time())
            raise
        replica.capacity.note_opened(loop.time())
        return session, reply

    def _keep(self, session: Session, stack: AsyncExitStack) -> None:
        """So that it ends with the environment."""
        if self._is_closed:
            raise SessionFailure("bad_reply", "the environment was closed")
        self._sessions.add(session)
        stack.callback(self._sessions.discard, session)

    def _session(self, replica: Replica) -> AbstractAsyncContextManager[Session]:
        return open_session(
            replica.socket_url,
            timeout_s=min(CONNECT_TIMEOUT_S, self.settings.step_timeout_s),
            max_message_bytes=self.settings.max_reply_bytes,
        )
