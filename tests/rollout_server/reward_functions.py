"""Reward functions as users write them, good and bad. Imported by reward workers, never by the tests themselves."""

import asyncio
import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]


def num_characters(prompt: str, completion: str, row: Row) -> float:
    return len(prompt) + len(completion) + row.get("bonus", 0)


async def num_characters_async(prompt: str, completion: str, row: Row) -> float:
    await asyncio.sleep(0)
    return num_characters(prompt, completion, row)


def obeys(prompt: str, completion: str, row: Row) -> Any:
    """Does what the completion says: the shared environment suite speaks to every kind of environment like this."""
    del prompt, row
    action, _, argument = completion.partition(" ")
    return _ACTIONS[action](argument)


async def obeys_async(prompt: str, completion: str, row: Row) -> Any:
    if completion == "hang":
        await asyncio.Event().wait()
    if completion == "rendezvous":
        return await _rendezvous()
    return obeys(prompt, completion, row)


def _hang(_: str) -> None:
    signal.pause()


def _raise(message: str) -> None:
    raise KeyError(message)


def _raise_unprintable(_: str) -> None:
    class Unprintable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    raise Unprintable


def _print(text: str) -> float:
    print(text * 1000, flush=True)  # noqa: T201 - users do
    os.write(1, b"\x00\xff\xff\xff\xff garbage")
    print(text, file=sys.__stdout__)
    return 1.0


def _garble(_: str) -> float:
    """Writes into whatever is open, the connection to the server included."""
    for descriptor in range(3, 1024):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff" * 100)
    return 1.0


def _start_program_that_never_ends(path: str) -> None:
    program = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(f"{os.getpid()} {program.pid}")
    signal.pause()


_num_met = 0
_all_met = asyncio.Event()


async def _rendezvous() -> float:
    """Ends only when three calls of it run at once."""
    global _num_met
    _num_met += 1
    if _num_met == 3:
        _all_met.set()
    await _all_met.wait()
    return 1.0


_ACTIONS: dict[str, Any] = {
    "reward": float,
    "int": int,
    "numpy": lambda text: importlib.import_module("numpy").float32(text),
    "fraction": Fraction,
    "wait": lambda text: float(not threading.Event().wait(float(text))),
    "hang": _hang,
    "block": _hang,
    "raise": _raise,
    "raise_unprintable": _raise_unprintable,
    "raise_cancelled": lambda _: (_ for _ in ()).throw(asyncio.CancelledError()),
    "raise_timeout": lambda _: (_ for _ in ()).throw(TimeoutError("of its own")),
    "raise_surrogate": lambda _: _raise("\ud800"),
    "leave": lambda text: sys.exit(int(text)),
    "die": lambda text: os._exit(int(text)),
    "crash": lambda _: ctypes.string_at(0),
    "nan": lambda _: float("nan"),
    "infinity": lambda _: float("inf"),
    "none": lambda _: None,
    "text": lambda text: text,
    "boolean": lambda _: True,
    "numpy_boolean": lambda _: importlib.import_module("numpy").bool_(True),
    "huge": lambda _: 1e30,
    "huge_int": lambda _: 10**400,
    "list": lambda _: [1.0],
    "print": _print,
    "garble": _garble,
    "start_program": _start_program_that_never_ends,
    "process": lambda _: os.getpid(),
    "heavy_modules": lambda _: sum(name in sys.modules for name in ("torch", "transformers", "zmq", "vllm")),
    "accelerator": lambda _: len(os.environ["CUDA_VISIBLE_DEVICES"]),
}

not_a_function = 3


def takes_too_little(prompt: str) -> float:
    return len(prompt)
