"""Blocking work of the user's (datasets, generators) beside the event loop."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class Background:
    """A daemon thread, for one call after the other: user code that hangs does not keep us from exiting."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name="background", daemon=True).start()

    async def run(self, function: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.put(lambda: _call(function, loop, future))
        return await future

    def close(self) -> None:
        """It ends when the call that is running has."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


async def in_thread(function: Callable[[], T]) -> T:
    """The function's result, from a thread that it has for itself."""
    background = Background()
    try:
        return await background.run(function)
    finally:
        background.close()


def _call(function: Callable[[], T], loop: asyncio.AbstractEventLoop, future: "asyncio.Future[T]") -> None:
    """The loop, and whoever waits there, may be gone when the function returns."""

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # there is one when there is no error
        else:
            future.set_exception(error)

    with suppress(RuntimeError):
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 - it is raised where the result is awaited
            loop.call_soon_threadsafe(settle, None, error)
        else:
            loop.call_soon_threadsafe(settle, result, None)
