"""Real servers in processes of their own."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from common.environments import EnvironmentSettings
from common.wire.foreign import ConnectionBroken
from rollout_server.environments.http_server import HttpFailure, HttpServer
from rollout_server.environments.verifiers_server import VerifiersServer
from tests.environments.__main__ import python_of

START_S = 90.0


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def answers_http(port: int) -> bool:
    async with HttpServer(f"http://127.0.0.1:{port}/openapi.json", max_reply_bytes=1 << 20) as http:
        try:
            await http.get(timeout_s=5)
        except HttpFailure:
            return False
        return True


async def answers_verifiers(port: int) -> bool:
    async with VerifiersServer(f"verifiers+tcp://127.0.0.1:{port}", EnvironmentSettings()) as server:
        try:
            await server.check(timeout_s=5)
        except ConnectionBroken:
            return False
        return True


@asynccontextmanager
async def running(
    name: str, script: Path, *flags: str, port: int, answers: Callable[[int], Awaitable[bool]] = answers_http
) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server, once it answers."""
    process = await asyncio.create_subprocess_exec(
        str(python_of(name)), str(script), "--port", str(port), *flags, start_new_session=True
    )
    try:
        async with asyncio.timeout(START_S):
            while not await answers(port):
                assert process.returncode is None
                await asyncio.sleep(0.1)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
