"""How a server talks to its reward workers: JSON frames, each after its length as four little-endian bytes."""

import struct
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from common.messages import Finite
from rollout_server.environments.environment import FailureKind

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 1 << 28


class FrameError(ValueError):
    """The peer does not keep to the frames; nothing it says later can be trusted."""


class Hello(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """First frame of a worker. `error` is empty when it can take calls."""

    concurrent: bool  # True: runs all calls it has at once. False: one after the other, in the order sent
    error: str = ""
    has_episodes: bool = False  # a class with reset and step, not a function


class Call(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One call of the user's code. A frame to the worker is a list of these. A close is not answered."""

    call_id: int
    prompt: str
    completion: str
    row: msgspec.Raw  # the JSON object of the dataset
    verb: Literal["reward", "reset", "step", "close"] = "reward"
    episode_id: int = 0
    seed: int = 0


class Outcome(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The answer to one call: a reward, or the kind and reason of its failure. One per frame, as soon as known."""

    call_id: int
    reward: Finite | None  # 0 for a reset
    kind: FailureKind | None = None
    reason: Annotated[str, Meta(max_length=4096)] = ""
    observation: str | list[dict[str, Any]] = ""
    done: bool = True
    truncated: bool = False


def pack(message: Hello | Outcome | list[Call]) -> bytes:
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Cuts a byte stream into frames."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_frame_bytes = max_frame_bytes
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies of all frames that are complete now; raises FrameError for an impossible length."""
        self._data += data
        start = 0
        try:
            while len(self._data) - start >= _LENGTH.size:
                (num_bytes,) = _LENGTH.unpack_from(self._data, start)
                if num_bytes > self._max_frame_bytes:
                    raise FrameError(f"a frame of {num_bytes} bytes was announced, at most {self._max_frame_bytes} fit")
                end = start + _LENGTH.size + num_bytes
                if len(self._data) < end:
                    break
                body = bytes(self._data[start + _LENGTH.size : end])
                start = end
                yield body
        finally:
            del self._data[:start]
