"""A small HTTP server whose every reply, good or bad, is decided by the test."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.listening import stop_listening


@dataclass
class Request:
    head: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Hangs(Exception):
    """Raised by a handler: the request is never answered."""


class Dies(Exception):
    """Raised by a handler: the connection is cut without a reply."""


Handler = Callable[[Request], Awaitable[bytes]]


def reply(body: bytes | str, *, status: int = 200, headers: str = "", length: int | None = None) -> bytes:
    """Bytes of an HTTP/1.1 reply."""
    body = body.encode() if isinstance(body, str) else body
    head = f"HTTP/1.1 {status} Said\r\nContent-Length: {len(body) if length is None else length}\r\n{headers}\r\n"
    return head.encode() + body


@dataclass
class HttpTwin:
    handler: Handler
    requests: list[Request] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.num_open += 1
        self._writers.add(writer)
        try:
            while head := await self._head(reader):
                length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
                request = Request(head, await reader.readexactly(length))
                self.requests.append(request)
                writer.write(await self.handler(request))
                await writer.drain()
        except Hangs:
            await reader.read()
        except (Dies, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.num_open -= 1
            self._writers.discard(writer)
            writer.transport.abort()

    async def _head(self, reader: asyncio.StreamReader) -> str:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return ""
        return "\r\n".join([head.split("\r\n")[0], *(line.lower() for line in head.split("\r\n")[1:])])

    async def start(self, port: int) -> None:
        self._server = await asyncio.start_server(self.serve, "127.0.0.1", port, limit=1 << 22)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and cut all connections."""
        assert self._server is not None
        await stop_listening(self._server)
        for writer in self._writers:
            writer.transport.abort()
        async with asyncio.timeout(10):
            while self.num_open:
                await asyncio.sleep(0.001)


@asynccontextmanager
async def an_http_server(handler: Handler, *, port: int = 0) -> AsyncIterator[HttpTwin]:
    twin = HttpTwin(handler)
    await twin.start(port)
    try:
        yield twin
    finally:
        await twin.stop()


# --- a reward model that does what the completion says ---------------------------------------------------------------

REWARDS = {
    "nan": "NaN",
    "infinity": "Infinity",
    "none": "null",
    "text": '"1.0"',
    "boolean": "true",
    "numpy_boolean": "true",
    "huge": "1e30",
    "huge_int": "1" + "0" * 400,
    "list": "[1.0]",
    "fraction": "0.25",
}


async def obeys(request: Request) -> bytes:
    """Each query is an action and its argument, as in reward_functions.obeys."""
    rewards = []
    for query in request.json["query"]:
        action, _, argument = query.partition(" ")
        if action in ("hang", "block"):
            raise Hangs
        if action == "die":
            raise Dies
        if action == "status":
            return reply("told to", status=int(argument))
        rewards.append(REWARDS.get(action, argument))
    return reply(f'{{"rewards": [{", ".join(rewards)}], "scores": [], "extra_logs": {{}}}}')
