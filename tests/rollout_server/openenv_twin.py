"""A small OpenEnv server that does what its actions say, good or bad. The wire is that of openenv 0.10."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from tests.listening import stop_listening

TEXT_ACTION = {
    "type": "object",
    "properties": {"metadata": {"type": "object"}, "text": {"type": "string"}},
    "required": ["text"],
}
REWARDS: dict[str, Any] = {
    "nan": float("nan"), "infinity": float("inf"), "none": None, "text": "1.0", "boolean": True, "numpy_boolean": True,
    "huge": 1e30, "huge_int": 10**400, "list": [1.0], "fraction": 0.25,
}  # fmt: skip


@dataclass
class OpenEnvTwin:
    capacity: int = 10_000
    schema: Any = field(default_factory=lambda: {"action": TEXT_ACTION, "observation": {}, "state": {}})
    status: HTTPStatus | None = None  # said to every handshake, in place of a connection
    location: str = ""
    num_sessions: int = 0
    most_sessions: int = 0
    num_begun: int = 0
    num_refused: int = 0
    resets: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0
    at_reset: str = ""  # an action in place of a sound answer to each reset
    tools: list[Any] = field(default_factory=list)
    _server: Server | None = None

    @property
    def url(self) -> str:
        return f"openenv+ws://127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        self._server = await serve(
            self.serve, "127.0.0.1", port, process_request=self.answer_http, compression=None, max_size=None,
            ping_interval=None, close_timeout=0.2,
        )  # fmt: skip
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        await stop_listening(self._server)
        for connection in list(self._server.connections):
            connection.transport.abort()
        await self._server.wait_closed()

    def answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/schema":
            return connection.respond(HTTPStatus.OK, json.dumps(self.schema))
        if self.status is not None:
            response = connection.respond(self.status, "no\n")
            if self.location:
                response.headers["Location"] = self.location
            return response
        return None if request.path == "/ws" else connection.respond(HTTPStatus.NOT_FOUND, "")

    async def serve(self, connection: ServerConnection) -> None:
        if self.num_sessions >= self.capacity:
            self.num_refused += 1
            await connection.send(an_error("CAPACITY_REACHED", "all taken"))
            return
        self.num_sessions += 1
        self.num_begun += 1
        self.most_sessions = max(self.most_sessions, self.num_sessions)
        try:
            async for message in connection:
                request = json.loads(message)
                if request["type"] == "close":
                    return
                await self.answer(connection, request["type"], request.get("data"))
        except ConnectionClosed:
            pass
        finally:
            self.num_sessions -= 1

    async def answer(self, connection: ServerConnection, kind: str, data: Any) -> None:
        if kind == "mcp":
            await connection.send(json.dumps({"type": "mcp", "data": {"id": 1, "result": {"tools": self.tools}}}))
        elif kind == "reset":
            self.resets.append(data)
            await self.do(connection, self.at_reset or "say do")
        elif "tool_name" in data:
            result = {"tool_name": data["tool_name"], "result": {"data": data["arguments"]}, "error": None}
            await connection.send(an_observation(result))
        elif "text" not in data:
            await connection.send(an_error("VALIDATION_ERROR", "Invalid message"))
        else:
            await self.do(connection, data["text"])

    async def do(self, connection: ServerConnection, text: str) -> None:
        action, _, argument = text.partition(" ")
        match action:
            case "say":
                await connection.send(an_observation({"metadata": {}, "text": argument}))
            case "hang" | "block":
                await connection.wait_closed()
            case "die":
                connection.transport.abort()
            case "slow":
                await asyncio.sleep(float(argument))
                await connection.send(an_observation({"text": "at last"}, reward=0.5))
            case "error":
                await connection.send(an_error(argument, "boom"))
            case "raw":
                await connection.send(argument)
            case "bytes":
                await connection.send(b"\xff\xfe")
            case "big" if int(argument) > 8 << 20:
                await connection.send(itertools.repeat("x" * (1 << 18), int(argument) >> 18))
            case "big":
                await connection.send(an_observation({"text": "x" * int(argument)}))
            case "twice":
                await connection.send(an_observation({"text": "one"}, reward=1.0))
                await connection.send(an_observation({"text": "two"}, reward=2.0))
            case "finish":
                await connection.send(an_observation({"text": "", "answer": "secret"}, reward=1.0, done=True))
            case _:
                reward = REWARDS[action] if action in REWARDS else float(argument)
                await connection.send(an_observation({"text": "end"}, reward=reward, done=True))


def an_observation(observation: Any, *, reward: Any = None, done: Any = False) -> str:
    return json.dumps({"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}})


def an_error(code: str, message: str) -> str:
    return json.dumps({"type": "error", "data": {"message": message, "code": code}})


@asynccontextmanager
async def an_openenv_server(**fields: Any) -> AsyncIterator[OpenEnvTwin]:
    twin = OpenEnvTwin(**fields)
    await twin.start()
    try:
        yield twin
    finally:
        await twin.stop()
