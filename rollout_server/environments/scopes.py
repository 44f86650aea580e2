"""Scopes: requests of many episodes that all end when their environment is closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rollout_server.environments.environment import EnvironmentFailure


class Scopes:
    """What runs inside open() is cut off by close(), and raises EnvironmentFailure; so does all that comes later."""

    def __init__(self) -> None:
        self._open: set[asyncio.Timeout] = set()
        self._is_closed = False
        self._all_ended = asyncio.Event()
        self._all_ended.set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        if self._is_closed:
            raise _closed()
        try:
            async with asyncio.timeout(None) as scope:
                self._enter(scope)
                try:
                    yield
                finally:
                    self._leave(scope)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise _closed() from error

    def _enter(self, scope: asyncio.Timeout) -> None:
        self._open.add(scope)
        self._all_ended.clear()

    def _leave(self, scope: asyncio.Timeout) -> None:
        self._open.discard(scope)
        if not self._open:
            self._all_ended.set()

    async def close(self) -> None:
        """Returns when nothing is open any more."""
        self._is_closed = True
        now = asyncio.get_running_loop().time()
        for scope in self._open:
            scope.reschedule(now)
        await self._all_ended.wait()


def _closed() -> EnvironmentFailure:
    return EnvironmentFailure("environment_error", "the environment was closed")
