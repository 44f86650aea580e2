"""A reward worker: a process that imports a user's function and answers calls of it over a socket.

Started by WorkerProcess as `python -m rollout_server.environments.worker`. It imports nothing heavy, so that it starts
quickly and holds no accelerator; what the function prints goes to standard error, never into the protocol.
"""

import asyncio
import ctypes
import importlib
import inspect
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from rollout_server.environments.environment import MAX_REASON_CHARS, EnvironmentFailure, check_reward
from rollout_server.environments.frames import Call, FrameBuffer, Hello, Outcome, pack

RECEIVE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_decode_calls = msgspec.json.Decoder(list[Call]).decode

RaisedByUsers = (Exception, SystemExit, asyncio.CancelledError)
"""A user's function may raise anything; only a KeyboardInterrupt or GeneratorExit ends the worker."""

RewardFunction = Callable[[str, str, dict[str, Any]], Any]


def main(argv: list[str]) -> int:
    """argv: file descriptor of the socket, process id of the parent, time-out in seconds, module, function."""
    descriptor, parent_pid, timeout_s, module, name = argv
    _die_with_parent(int(parent_pid))
    link = socket.socket(fileno=int(descriptor))
    link.set_inheritable(False)  # a program started by the function must not keep the connection open
    try:
        function = _load(module, name)
    except RaisedByUsers as error:
        link.sendall(pack(Hello(concurrent=False, error=_described(error))))
        return 1
    concurrent = _is_async(function)
    link.sendall(pack(Hello(concurrent=concurrent)))
    if concurrent:
        asyncio.run(_serve_concurrently(link, function, float(timeout_s)))
    else:
        _serve_one_by_one(link, function)
    return 0


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit(1)


def _load(module: str, name: str) -> RewardFunction:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = getattr(importlib.import_module(module), name, None)
    if function is None:
        raise AttributeError(f"module {module} has no function {name}")
    if not callable(function):
        raise TypeError(f"{module}.{name} is not a function but a {type(function).__name__}")
    try:
        inspect.signature(function).bind("prompt", "completion", {})
    except TypeError as error:
        raise TypeError(f"{module}.{name} must take (prompt, completion, row): {error}") from error
    return function  # type: ignore[no-any-return]


def _is_async(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _serve_one_by_one(link: socket.socket, function: RewardFunction) -> None:
    # Each outcome is sent before the next call starts: when the process dies, the parent knows which call it was.
    frames = FrameBuffer()
    while data := link.recv(RECEIVE_BYTES):
        for frame in frames.feed(data):
            for call in _decode_calls(frame):
                link.sendall(pack(_outcome(function, call)))


def _outcome(function: RewardFunction, call: Call) -> Outcome:
    try:
        value = function(call.prompt, call.completion, msgspec.json.decode(call.row))
        return Outcome(call.call_id, check_reward(value))
    except EnvironmentFailure as failure:
        return Outcome(call.call_id, None, failure.kind, failure.reason)
    except RaisedByUsers as error:
        return Outcome(call.call_id, None, "environment_error", _described(error))


async def _serve_concurrently(link: socket.socket, function: RewardFunction, timeout_s: float) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=link)

    async def answer(call: Call) -> None:
        writer.write(pack(await _awaited_outcome(function, call, timeout_s)))

    frames = FrameBuffer()
    async with asyncio.TaskGroup() as answers:
        while data := await reader.read(RECEIVE_BYTES):
            for frame in frames.feed(data):
                for call in _decode_calls(frame):
                    answers.create_task(answer(call))
        os._exit(0)  # the parent is gone or wants no answer any more; running calls are of no use to anybody


async def _awaited_outcome(function: RewardFunction, call: Call, timeout_s: float) -> Outcome:
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            value = await function(call.prompt, call.completion, msgspec.json.decode(call.row))
        return Outcome(call.call_id, check_reward(value))
    except EnvironmentFailure as failure:
        return Outcome(call.call_id, None, failure.kind, failure.reason)
    except RaisedByUsers as error:
        if deadline.expired():
            return Outcome(call.call_id, None, "environment_timeout", f"no reward within {timeout_s:g} s")
        return Outcome(call.call_id, None, "environment_error", _described(error))


def _described(error: BaseException) -> str:
    """Type, message and place of an exception, bounded in length; survives one whose __str__ raises."""
    try:
        message = str(error)
    except Exception:  # noqa: BLE001 - __str__ of a user's exception
        message = "(its message cannot be shown)"
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    described = f"{type(error).__name__}: {message}"[: MAX_REASON_CHARS - len(place)] + place
    return described.encode(errors="replace").decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
