"""A twin of the verifiers environment server: its wire, and whatever else a test has it say."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tests.rollout_server.gateway.builders_gateway import a_client, say, user

DONE = {"ok": True, "rewards": {"right": {"score": 1.0, "weight": 1.0}}, "stop_condition": "agent_completed"}


def packed(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


@dataclass
class Run:
    """One run, as the server is asked for it."""

    server: "Twin"
    peer: bytes
    id: bytes
    request: dict[str, Any]

    async def send(self, kind: bytes, payload: bytes) -> None:
        await self.server.socket.send_multipart([self.peer, self.id, kind, payload])

    async def ask(self, times: int = 1) -> str:
        """The policy's last answer to the task, through the gateway and on its key alone."""
        async with a_client(self.request["client"]["base_url"], "EMPTY") as client:
            messages = [user(self.request["task_data"]["prompt"])]
            for _ in range(times):
                await say(client, messages)
            return str(messages[-1]["content"])

    async def grow(self, trace: str = "t", *, calls: int = 1, **fields: Any) -> None:
        """A delta: so many calls with a question and an answer each, and what else is given."""
        nodes = [{"message": {"role": role}, "sampled": role == "a", "token_ids": []} for role in "ua" * calls]
        delta = {"trace": trace, "nodes": nodes, "calls": [{"node": 2 * call + 1} for call in range(calls)]}
        await self.send(b"delta", packed(delta | fields))

    async def finish(self, **fields: Any) -> None:
        reply = {"success": True, "error": None, "head": {"id": "e", "ok": True, "errors": []},
                 "traces": [{"id": "t", "nodes": 2, "calls": 1}]}  # fmt: skip
        await self.send(b"reply", packed(reply | fields))


Handler = Callable[[Run], Awaitable[None]]


async def answers(run: Run) -> None:
    """A good environment, whose agent asks once and is content with 5."""
    await run.grow(calls=0, open={"version": 1, "task": {}}, set={"ok": False, "rewards": {}, "timing": {"start": 1.5}})
    right = await run.ask() == "5"
    await run.grow(set={"rewards": {"right": {"score": float(right), "weight": 0.5}, "style": {"score": 1}}})
    await run.grow(calls=0, set={"ok": True, "stop_condition": "agent_completed", "is_completed": True})
    await run.finish()


@dataclass
class Twin:
    socket: Any
    handler: Handler
    port: int
    is_deaf: bool = False  # says nothing, to nobody
    runs: dict[bytes, "asyncio.Task[None]"] = field(default_factory=dict)
    asked: list[Run] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    numbers: Any = field(default_factory=itertools.count)

    @property
    def url(self) -> str:
        return f"verifiers+tcp://127.0.0.1:{self.port}"

    async def serve(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            peer, request_id, method, payload = await self.socket.recv_multipart()
            if self.is_deaf:
                continue
            if method == b"run":
                run = Run(self, peer, request_id, msgspec.msgpack.decode(payload))
                self.asked.append(run)
                self.runs[request_id] = tasks.create_task(self._play(run))
                continue
            if method == b"cancel":
                target = msgspec.msgpack.decode(payload)["request_id"]
                self.cancelled.append(target)
                if target.encode() in self.runs:
                    self.runs[target.encode()].cancel()
            await self.socket.send_multipart([peer, request_id, b"reply", packed({"success": True, "error": None})])

    async def _play(self, run: Run) -> None:
        try:
            await self.handler(run)
        except asyncio.CancelledError:
            if not self.socket.closed:
                await run.send(b"reply", packed({"success": False, "error": "Cancelled: rollout aborted"}))


@asynccontextmanager
async def a_verifiers_server(handler: Handler, port: int = 0) -> AsyncIterator[Twin]:
    context = zmq.asyncio.Context()
    with context.socket(zmq.ROUTER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.bind(f"tcp://127.0.0.1:{port or '*'}")
        bound = int(socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        twin = Twin(socket, handler, bound)
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(twin.serve(tasks))
            try:
                yield twin
            finally:
                serving.cancel()
                for run in twin.runs.values():
                    run.cancel()
    context.term()
