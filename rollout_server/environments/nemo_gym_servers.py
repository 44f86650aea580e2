"""NemoGymServers: where an episode of a NeMo Gym environment begins, of one or several servers of it."""

import asyncio
import random
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

from common.environments import EnvironmentSettings
from rollout_server.environments.capacity import Capacity
from rollout_server.environments.environment import BadRow, EnvironmentFailure, FailureKind
from rollout_server.environments.health import Health, retry_delay_s
from rollout_server.environments.http_server import HttpFailure, HttpServer
from rollout_server.environments.lifeline import Lifeline
from rollout_server.environments.nemo_gym_session import Session
from rollout_server.environments.replicas import least_busy, place_at
from rollout_server.environments.scopes import Scopes

PREFIX = "nemo-gym+"

Style = Literal["verify", "step"]
"""verify: /seed_session, tools, /verify once at the end. step: /reset, then /step for each turn, as in Gymnasium."""

BEGIN: Mapping[Style, str] = {"verify": "/seed_session", "step": "/reset"}
INTERNAL_ERROR = 500  # the environment raised; 502, 503 and 504 say that it is not there

_KINDS: Mapping[str, FailureKind] = {
    "unreachable": "environment_unavailable",
    "unusable": "environment_unavailable",
    "timeout": "environment_timeout",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A session that has begun."""

    replica: "Replica"
    stack: AsyncExitStack  # closing it frees the session's place
    session: Session
    style: Style
    reply: dict[str, Any]  # to the first request


class Replica:
    """One server of the environment."""

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        if not url.startswith(PREFIX):
            raise ValueError(f"{url!r} must look like nemo-gym+http://HOST:PORT")
        self.url = url.removeprefix(PREFIX).rstrip("/")
        self.lifeline = Lifeline(*HttpServer(self.url, max_reply_bytes=settings.max_reply_bytes).address)
        self.health = Health()
        self.capacity = Capacity(settings.max_concurrent)
        self.style: Style | None = None  # of a server that has answered
        self.closes = True  # it knows /close_session, or has not been asked

    def __repr__(self) -> str:
        return f"<Replica {self.url}, {self.capacity!r}, {self.health!r}>"


class NemoGymServers:
    """Repeats what begins an episode while that can do no harm, and fails at once while all servers are down."""

    def __init__(self, replicas: list[Replica], settings: EnvironmentSettings) -> None:
        self.settings = settings
        self._replicas = replicas
        self._random = random.Random()
        self._scopes = Scopes()
        self._watches: list[asyncio.Task[None]] = []
        self._tasks = asyncio.TaskGroup()

    def __repr__(self) -> str:
        return repr(self._replicas)

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._watches = [self._tasks.create_task(replica.lifeline.watch()) for replica in self._replicas]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for watch in self._watches:
            watch.cancel()
        cancelled = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
        await self._scopes.close()
        await self._tasks.__aexit__(*cancelled)

    async def begin(self, row: Mapping[str, Any]) -> Begun:
        """A session for the row. Raises EnvironmentFailure, and BadRow for a row that the server does not want."""
        deadline = asyncio.get_running_loop().time() + self.settings.capacity_timeout_s
        for tries in range(1, self.settings.tries + 1):
            replica = await least_busy(self._replicas, deadline=deadline)
            try:
                return await self._try(replica, row, deadline)
            except HttpFailure as failure:
                if failure.kind == "refused":
                    raise BadRow(failure.reason) from failure
                if failure.kind != "unreachable" or tries == self.settings.tries:
                    raise EnvironmentFailure(_kind(failure, replica.health), failure.reason) from failure
            await asyncio.sleep(retry_delay_s(tries, self._random))
        raise AssertionError("the last try returns or raises")

    async def _try(self, replica: Replica, row: Mapping[str, Any], deadline: float) -> Begun:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(place_at(replica, replica.url, self.settings, deadline=deadline))
                sent_at = loop.time()
                session, style, reply = await self._begin(replica, stack, row)
                replica.health.note_success(loop.time())
                return Begun(replica=replica, stack=stack.pop_all(), session=session, style=style, reply=reply)
        except (asyncio.CancelledError, EnvironmentFailure):
            replica.health.note_nothing()
            raise
        except HttpFailure as failure:
            if failure.kind in _KINDS:
                replica.health.note_failure(failure.reason, loop.time(), sent_at=sent_at)
            else:
                replica.health.note_success(loop.time())  # it is up, and does not want this
            raise

    async def _begin(
        self, replica: Replica, stack: AsyncExitStack, row: Mapping[str, Any]
    ) -> tuple[Session, Style, dict[str, Any]]:
        """Of a server that has not answered yet, finds out which style it is of."""
        styles: list[Style] = [replica.style] if replica.style else ["verify", "step"]
        for style in styles:
            session = Session(replica.url, replica.lifeline, self._scopes, self.settings)
            await stack.enter_async_context(session)
            try:
                reply = await session.begin(BEGIN[style], row)
            except HttpFailure as failure:
                if failure.status not in (404, 405):
                    raise
                replica.style = None
                continue
            replica.style = style
            return session, style, reply
        raise HttpFailure("unusable", f"{replica.url} has neither /seed_session nor /reset: no NeMo Gym server?")


def _kind(failure: HttpFailure, health: Health) -> FailureKind:
    """A server that raises for one row and serves others is not down."""
    if failure.status == INTERNAL_ERROR and not health.is_open:
        return "environment_error"
    return _KINDS.get(failure.kind, "environment_error")
