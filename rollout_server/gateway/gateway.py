"""Gateway: the sessions of one rollout server, and the HTTP server that agents reach them by."""

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rollout_server.gateway.api_error import ApiError
from rollout_server.gateway.listening import Listening
from rollout_server.gateway.offers import Offers
from rollout_server.gateway.session import Policy, Session, ended_error
from rollout_server.gateway.tools import HermesTools, ToolParser

MAX_REMEMBERED = 4096  # keys of sessions that have ended, to say so


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Where agents reach the gateway, and how it reads what the policy says."""

    listen: str = "127.0.0.1:0"  # HOST:PORT; port 0 is any free one
    url: str | None = None  # how agents reach it, if not at that address: http://HOST:PORT
    model: str = "policy"  # the name that it gives the policy
    agent_key: str | None = None  # what an agent must show to be given a task; None: nothing


class Gateway:
    """An async context manager, in the process of the engine."""

    def __init__(self, settings: GatewaySettings, tools: ToolParser | None = None) -> None:
        """Raises UserError for an address that cannot be one."""
        self.settings = settings
        self.tools = tools or HermesTools()
        self.offers = Offers()
        self._sessions: dict[str, Session] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._listening = Listening(self, settings.listen)

    def __repr__(self) -> str:
        return f"<Gateway {self.address}, {len(self._sessions)} sessions>"

    @property
    def address(self) -> str:
        """http://HOST:PORT, as agents reach it."""
        return self.settings.url or self._listening.address

    async def __aenter__(self) -> Self:
        await self._listening.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._listening.__aexit__(kind, error, trace)

    @asynccontextmanager
    async def session(self, policy: Policy, *, max_calls: int) -> AsyncIterator[Session]:
        """A session for one episode; leaving it ends it, and what it has sampled is then complete.

        Raises LeaseFailure, with what runs inside cut off, when a call finds that the lease cannot be fulfilled.
        """
        session = Session(
            policy, self.tools, self.offers, address=self.address, model=self.settings.model, max_calls=max_calls
        )
        self._sessions[session.api_key] = session
        try:
            async with session.watched():
                yield session
        finally:
            del self._sessions[session.api_key]
            self._ended[session.api_key] = None
            while len(self._ended) > MAX_REMEMBERED:
                self._ended.popitem(last=False)

    def session_of(self, api_key: str) -> Session:
        """Raises ApiError."""
        session = self._sessions.get(api_key)
        if session is not None:
            return session
        if api_key in self._ended:
            raise ended_error()
        raise ApiError(401, "invalid_api_key", "no session has this key: use the one that the episode was given")
