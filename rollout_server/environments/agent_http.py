"""agent+http://host:port/path: an agent server is asked once per episode, and drives it through the gateway."""

import asyncio
import random
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from common.environments import EnvironmentSettings
from rollout_server.environments.capacity import Capacity
from rollout_server.environments.environment import EnvironmentFailure, FailureKind, Outcome, Row, check_reward
from rollout_server.environments.health import Health, retry_delay_s
from rollout_server.environments.http_server import HttpFailure, HttpServer
from rollout_server.environments.replicas import least_busy, place_at
from rollout_server.environments.scopes import Scopes

if TYPE_CHECKING:
    from rollout_server.gateway.session import Session

PREFIX = "agent+"
INTERNAL_ERROR = 500  # the agent raised; other 5xx say that it is not there

_KINDS: Mapping[str, FailureKind] = {
    "unreachable": "environment_unavailable",
    "unusable": "environment_unavailable",
    "timeout": "environment_timeout",
}


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent server answers when its episode is done; whatever else it says is left out."""

    reward: Any = None  # None: what the agent has told the gateway by set_reward
    truncated: bool | None = None
    masked: str | None = None  # why the episode must not be trained on


class Replica:
    """One agent server."""

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        if not url.startswith(PREFIX):
            raise ValueError(f"{url!r} must look like agent+http://HOST:PORT/PATH")
        self.server = HttpServer(url.removeprefix(PREFIX), max_reply_bytes=settings.max_reply_bytes)
        self._settings = settings
        self.health = Health()
        self.capacity = Capacity(settings.max_concurrent)

    async def ask(self, body: bytes, timeout_s: float) -> bytes:
        """On a connection of its own: a pool of thousands would be searched from end to end for each request."""
        async with HttpServer(self.server.url, max_reply_bytes=self._settings.max_reply_bytes) as server:
            return await server.post_json(body, timeout_s=timeout_s)

    def __repr__(self) -> str:
        return f"<Replica {self.server.url}, {self.capacity!r}, {self.health!r}>"


class AgentHttp:
    """The request says where the gateway is, the key of the episode's session, and the row; the reply, the reward.

    A request that fails is repeated while the agent has asked the policy for nothing.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError for a malformed URL."""
        self.url = url
        self.settings = settings
        self._replicas = [Replica(each, settings) for each in (url, *settings.replicas)]
        self._scopes = Scopes()
        self._random = random.Random()

    def __repr__(self) -> str:
        return f"<AgentHttp {self.url}, {self._replicas}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._scopes.close()

    async def play(self, row: Row, session: "Session", *, seed: int) -> Outcome:
        """See AgentEnvironment."""
        body = request_body(row, session, seed=seed, timeout_s=self.settings.episode_timeout_s)
        deadline = asyncio.get_running_loop().time() + self.settings.capacity_timeout_s
        async with self._scopes.open():
            for tries in range(1, self.settings.tries + 1):
                replica = await least_busy(self._replicas, deadline=deadline)
                try:
                    return read_outcome(await self._ask(replica, body, deadline), session)
                except HttpFailure as failure:
                    is_over = failure.kind != "unreachable" or session.has_begun or tries == self.settings.tries
                    if is_over:
                        raise EnvironmentFailure(_kind(failure, replica, session), failure.reason) from failure
                await asyncio.sleep(retry_delay_s(tries, self._random))
        raise AssertionError("the last try returns or raises")

    async def _ask(self, replica: Replica, body: bytes, deadline: float) -> bytes:
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        try:
            async with place_at(replica, replica.server.url, self.settings, deadline=deadline):
                sent_at = loop.time()
                if replica.health.is_open:  # an episode may take minutes; the others need not wait for its end
                    await replica.server.connect(timeout_s=self.settings.step_timeout_s)
                    replica.health.note_success(loop.time())
                content = await replica.ask(body, self.settings.episode_timeout_s)
        except (asyncio.CancelledError, EnvironmentFailure):
            replica.health.note_nothing()
            raise
        except HttpFailure as failure:
            if failure.kind in ("unreachable", "unusable"):
                replica.health.note_failure(failure.reason, loop.time(), sent_at=sent_at)
            else:
                replica.health.note_success(loop.time())
            raise
        replica.health.note_success(loop.time())
        return content


def request_body(row: Row, session: "Session", *, seed: int, timeout_s: float) -> bytes:
    """What an agent must know of its episode, as JSON."""
    return msgspec.json.encode(session.invitation(row, seed=seed, timeout_s=timeout_s))


def read_outcome(content: bytes, session: "Session") -> Outcome:
    """Raises EnvironmentFailure for a reply that makes no sense, and where there is no reward."""
    try:
        reply = msgspec.json.decode(content or b"{}", type=Reply | None) or Reply()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvironmentFailure("environment_error", f"the agent's reply makes no sense: {error}") from error
    if reply.masked is not None:
        raise EnvironmentFailure("masked", reply.masked or "the agent gave no reason")
    truncated = reply.truncated is True
    if reply.reward is None:
        return Outcome(reward=session.outcome().reward, truncated=truncated)
    return Outcome(reward=check_reward(reply.reward), truncated=truncated)


def _kind(failure: HttpFailure, replica: Replica, session: "Session") -> FailureKind:
    """An agent that fails in the middle of an episode, or raises for one row and serves others, is not down."""
    kind = _KINDS.get(failure.kind, "environment_error")
    is_up = session.has_begun or (failure.status == INTERNAL_ERROR and not replica.health.is_open)
    return "environment_error" if kind == "environment_unavailable" and is_up else kind
