"""Capacity: how many sessions a server is asked for at once, learned from how many it refuses. Others wait here."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

QUIET_S = 5.0  # without a refusal; then one session more than before is tried


class Capacity:
    """First come, first served, so that nobody waits for ever while others come and go."""

    def __init__(self, most: int) -> None:
        self.limit = most
        self.in_use = 0
        self._most = most
        self._refused_at = -QUIET_S
        self._waiters: deque[asyncio.Future[None]] = deque()

    def __repr__(self) -> str:
        return f"<Capacity {self.in_use}/{self.limit}, {len(self._waiters)} waiting>"

    @property
    def load(self) -> float:
        """Sessions in use and waited for, over those that there are."""
        return (self.in_use + len(self._waiters)) / self.limit

    @asynccontextmanager
    async def slot(self, *, timeout_s: float) -> AsyncIterator[None]:
        """One session of the server; raises TimeoutError when none becomes free in time."""
        async with asyncio.timeout(timeout_s):
            await self._acquire()
        try:
            yield
        finally:
            self.in_use -= 1
            self._wake()

    async def _acquire(self) -> None:
        if self.in_use < self.limit and not self._waiters:
            self.in_use += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():  # it was given a slot at the same moment
                self.in_use -= 1
                self._wake()
            raise
        finally:
            with suppress(ValueError):
                self._waiters.remove(waiter)

    def _wake(self) -> None:
        while self._waiters and self.in_use < self.limit:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self.in_use += 1
                waiter.set_result(None)

    def note_full(self, now: float) -> None:
        """The server refused the session of one slot in use: the others are as many as it has."""
        self._refused_at = now
        self.limit = max(1, min(self.limit, self.in_use - 1))

    def note_opened(self, now: float) -> None:
        """The server gave a session; where all that are allowed are in use, there may be more by now."""
        if self.in_use >= self.limit and self.limit < self._most and now - self._refused_at >= QUIET_S:
            self._refused_at = now
            self.limit += 1
            self._wake()
