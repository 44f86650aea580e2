"""Listening: the HTTP server of the gateway, in the event loop of the process. The one file that names uvicorn."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

import uvicorn

from common.lifecycle import UserError
from rollout_server.gateway.routes import application

if TYPE_CHECKING:
    from rollout_server.gateway.gateway import Gateway

MAX_CONNECTIONS = 16384
LEAVE_S = 1  # how long requests may go on once the gateway is left: their sessions have ended by then
IDLE_S = 75  # longer than clients keep theirs


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for the process, not for this part of it."""
        yield


class Listening:
    """An async context manager; raises UserError when the address cannot be had."""

    def __init__(self, gateway: "Gateway", listen: str) -> None:
        """Raises UserError for what is not HOST:PORT."""
        host, separator, port = listen.rpartition(":")
        if not separator or not host or not port.isdecimal() or int(port) >= 1 << 16:
            raise UserError(f"--gateway-listen must be HOST:PORT, got {listen!r}; port 0 is any free one")
        self._host = host.strip("[]")
        self._port = int(port)
        config = uvicorn.Config(
            application(gateway),
            http="h11",  # it bounds the head of a request
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=LEAVE_S,
            limit_concurrency=MAX_CONNECTIONS,
        )
        self._server = _Server(config)
        self._tasks = asyncio.TaskGroup()

    @property
    def address(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}"

    async def __aenter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((self._host, self._port))
        except OSError as error:
            listener.close()
            raise UserError(f"the gateway cannot listen at {self._host}:{self._port}: {error}") from error
        self._port = listener.getsockname()[1]
        await self._tasks.__aenter__()
        self._tasks.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:
            await asyncio.sleep(0.001)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        cancelled = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
        await self._tasks.__aexit__(*cancelled)
