"""Lifeline: whether a server's process has ended since, and with it the sessions that it kept in memory."""

import asyncio

from rollout_server.environments.http_server import HttpFailure

RECONNECT_S = 0.5
CONNECT_TIMEOUT_S = 10.0


class Lifeline:
    """Holds one idle connection. When it breaks and the next one is refused, the process behind it is gone.

    A server that was started again answers as if nothing had happened: it takes an old session for a new one, whose
    reward means nothing. A connection that was only closed for being idle can be made again at once.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._is_up = asyncio.Event()
        self.deaths = 0

    def __repr__(self) -> str:
        return f"<Lifeline {self._host}:{self._port}, {'up' if self._is_up.is_set() else 'down'}, {self.deaths} deaths>"

    async def held(self, *, timeout_s: float) -> None:
        """Returns once there is a connection; raises HttpFailure."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_up.wait()
        except TimeoutError as error:
            reason = f"{self._host}:{self._port} takes no second connection"
            raise HttpFailure("unreachable", reason) from error

    async def watch(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began_s = loop.time()
            if not await self._hold() and self._is_up.is_set():
                self._is_up.clear()
                self.deaths += 1
            if not self._is_up.is_set() or loop.time() - began_s < RECONNECT_S:  # what hangs up at once is no server
                await asyncio.sleep(RECONNECT_S)

    async def _hold(self) -> bool:
        """Whether there was a connection; returns when it has broken."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self._host, self._port)
        except (OSError, TimeoutError):
            return False
        self._is_up.set()
        try:
            while await reader.read(1 << 12):
                pass
        except OSError:
            pass
        finally:
            writer.transport.abort()
        return True
