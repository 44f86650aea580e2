"""A router in a process of its own, for tests that measure its memory or may crash it: it echoes what it receives.

`python -m tests.router_process SETTINGS` prints its address, and a line of statistics for every line it is sent.
"""

import asyncio
import json
import logging
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from common.keys import load_server_keys
from common.wire import Router, open_router, options

TIMEOUT_S = 20.0


class RouterProcess:
    """The process, seen from the test."""

    def __init__(self, process: asyncio.subprocess.Process, address: str) -> None:
        self._process = process
        self.address = address
        self.errors = b""

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    async def refusals(self) -> dict[str, int]:
        """By reason."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        async with asyncio.timeout(TIMEOUT_S):
            return json.loads(await self._process.stdout.readline())

    async def refuses(self, reason: str, at_least: int = 1) -> None:
        """Returns once it has refused that often."""
        async with asyncio.timeout(TIMEOUT_S):
            while (await self.refusals()).get(reason, 0) < at_least:
                await asyncio.sleep(0.02)

    def memory_bytes(self, kind: str = "VmRSS") -> int:
        """VmRSS: resident now; VmHWM: at most since forget_peak()."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(kind + ":"):
                return int(line.split()[1]) * 1024
        raise ValueError(kind)

    def forget_peak(self) -> None:
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def num_descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._process.pid}/fd").iterdir()))

    async def end(self) -> int:
        """Waits for the process to end by itself; returns its exit code."""
        async with asyncio.timeout(TIMEOUT_S):
            _, self.errors = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode


@asynccontextmanager
async def a_router_process(**settings: Any) -> AsyncIterator[RouterProcess]:
    """settings: keys (a directory), max_frame_bytes, max_growth_bytes, held_bytes_of_all, max_descriptors."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.router_process",
        json.dumps(settings),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(TIMEOUT_S):
            address = (await process.stdout.readline()).decode().strip()
        yield RouterProcess(process, address)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def echo(router: Router) -> None:
    while True:
        for incoming in await router.receive():
            router.send(incoming.peer, incoming.frames)


async def serve(settings: dict[str, Any]) -> None:
    logging.basicConfig()
    options.HELD_BYTES_OF_ALL = settings.get("held_bytes_of_all", options.HELD_BYTES_OF_ALL)
    if "max_descriptors" in settings:
        resource.setrlimit(resource.RLIMIT_NOFILE, (settings["max_descriptors"],) * 2)
    keys = load_server_keys(Path(settings["keys"])) if "keys" in settings else None
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with (
        open_router(
            "tcp://127.0.0.1:0",
            max_frame_bytes=settings.get("max_frame_bytes", 1 << 20),
            keys=keys,
            max_growth_bytes=settings.get("max_growth_bytes"),
        ) as router,
        asyncio.TaskGroup() as tasks,
    ):
        echoing = tasks.create_task(echo(router))
        print(router.address, flush=True)  # noqa: T201 - for the test
        while await lines.readline():
            print(json.dumps(router.refusals()), flush=True)  # noqa: T201
        echoing.cancel()


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
