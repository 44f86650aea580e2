"""A worker: a process that imports a user's function or class and answers calls of it over a socket.

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
from collections.abc import Sequence

import msgspec

from rollout_server.environments.environment import MAX_REASON_CHARS, EnvironmentFailure
from rollout_server.environments.frames import Call, FrameBuffer, Hello, Outcome, pack
from rollout_server.environments.worker_target import Target, target_of

RECEIVE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_decode_calls = msgspec.json.Decoder(list[Call]).decode

RaisedByUsers = (Exception, SystemExit, asyncio.CancelledError)
"""A user's function may raise anything; only a KeyboardInterrupt or GeneratorExit ends the worker."""


def main(argv: list[str]) -> int:
    """argv: file descriptor of the socket, process id of the parent, time-out in seconds, most bytes of an
    observation, module, name, and what the name is called with, if with anything."""
    descriptor, parent_pid, timeout_s, max_observation_bytes, module, name, *arguments = argv
    _die_with_parent(int(parent_pid))
    link = socket.socket(fileno=int(descriptor))
    link.set_inheritable(False)  # a program started by the function must not keep the connection open
    try:
        target = _load(module, name, arguments, int(max_observation_bytes))
    except RaisedByUsers as error:
        link.sendall(pack(Hello(concurrent=False, error=_described(error))))
        return 1
    link.sendall(pack(Hello(concurrent=target.is_async, has_episodes=target.has_episodes)))
    if target.is_async:
        asyncio.run(_serve_concurrently(link, target, float(timeout_s)))
    else:
        _serve_one_by_one(link, target)
    return 0


def _die_with_parent(parent_pid: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        sys.exit(1)


def _load(module: str, name: str, arguments: Sequence[str], max_observation_bytes: int) -> Target:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    value = getattr(importlib.import_module(module), name, None)
    if value is None:
        raise AttributeError(f"module {module} has no function {name}")
    if arguments:
        value = value(*arguments)
    return target_of(value, f"{module}.{name}", max_observation_bytes=max_observation_bytes)


def _serve_one_by_one(link: socket.socket, target: Target) -> None:
    # Each outcome is sent before the next call starts: when the process dies, the parent knows which call it was.
    frames = FrameBuffer()
    while data := link.recv(RECEIVE_BYTES):
        for frame in frames.feed(data):
            for call in _decode_calls(frame):
                outcome = _outcome(target, call)
                if call.verb != "close":
                    link.sendall(pack(outcome))


def _outcome(target: Target, call: Call) -> Outcome:
    try:
        return target.finish(call, target.begin(call))
    except EnvironmentFailure as failure:
        return Outcome(call.call_id, None, failure.kind, failure.reason)
    except RaisedByUsers as error:
        return Outcome(call.call_id, None, "environment_error", _described(error))


async def _serve_concurrently(link: socket.socket, target: Target, timeout_s: float) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=link)

    async def answer(call: Call) -> None:
        outcome = await _awaited_outcome(target, call, timeout_s)
        if call.verb != "close":
            writer.write(pack(outcome))

    frames = FrameBuffer()
    async with asyncio.TaskGroup() as answers:
        while data := await reader.read(RECEIVE_BYTES):
            for frame in frames.feed(data):
                for call in _decode_calls(frame):
                    answers.create_task(answer(call))
        os._exit(0)  # the parent is gone or wants no answer any more; running calls are of no use to anybody


async def _awaited_outcome(target: Target, call: Call, timeout_s: float) -> Outcome:
    deadline = asyncio.timeout(timeout_s)
    try:
        async with deadline:
            value = target.begin(call)
            if inspect.isawaitable(value):
                value = await value
        return target.finish(call, value)
    except EnvironmentFailure as failure:
        return Outcome(call.call_id, None, failure.kind, failure.reason)
    except RaisedByUsers as error:
        if deadline.expired():
            return Outcome(call.call_id, None, "environment_timeout", f"no answer within {timeout_s:g} s")
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
