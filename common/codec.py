"""Messages to frames and back. Everything that comes off the wire is doubted here, and nowhere after.

A message is exactly two frames: the MessagePack header and the payload. The payload of a group, or of groups that are
sent together, is, with N the number of tokens of all their trajectories in order:

    token_ids [N] int32, behavior_logprobs [N] float32, loss_mask [N] uint8 (0 or 1), all little-endian, no padding

So all of it is checked at once: numpy looks at 16 trajectories in the time it needs for 2. token_versions are not in
the payload: the header has them as runs over the sampled tokens.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import msgspec
import numpy as np

from common.messages import GroupHeader, Message, PayloadMessage, TrajectoryHeader
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory

Frame = bytes | memoryview
Frames = list[Frame]

BYTES_PER_TOKEN = 4 + 4 + 1
LOGPROB_SLACK = 1e-4  # float32 log-softmax may exceed 0 by rounding; more than this is no rounding
MAX_QUOTED_CHARS = 200

_DECODE_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, MemoryError, OverflowError)


class ProtocolError(ValueError):
    """Bytes from a peer that no correct peer sends; says what was expected and what came."""


def encode(message: Message, payload: Frame = b"") -> Frames:
    return [msgspec.msgpack.encode(message), payload]


class Decoder:
    """Decodes the messages of one direction, and nothing else."""

    def __init__(self, union: Any, *, max_payload_bytes: int, max_header_bytes: int = 1 << 20) -> None:
        self._decoder = msgspec.msgpack.Decoder(union)
        self._max_header_bytes = max_header_bytes
        self._max_payload_bytes = max_payload_bytes

    def decode(self, frames: Sequence[Frame]) -> tuple[Message, memoryview]:
        """The message and its payload; raises ProtocolError for anything else."""
        if len(frames) != 2:
            raise ProtocolError(f"expected 2 frames, got {len(frames)}")
        header, payload = frames
        if len(header) > self._max_header_bytes:
            raise ProtocolError(f"header: expected at most {self._max_header_bytes} bytes, got {len(header)}")
        if len(payload) > self._max_payload_bytes:
            raise ProtocolError(f"payload: expected at most {self._max_payload_bytes} bytes, got {len(payload)}")
        try:
            message: Message = self._decoder.decode(header)
        except _DECODE_ERRORS as error:
            raise ProtocolError(f"header: {_printable(str(error))}") from error
        if len(payload) and not isinstance(message, PayloadMessage):
            raise ProtocolError(f"{type(message).__name__} carries no payload, got {len(payload)} bytes")
        return message, memoryview(payload).toreadonly()


def _printable(text: str) -> str:
    """The peer's own words may be in it: no control characters and no long lines for our log."""
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_QUOTED_CHARS])


def pack_group(group: Group) -> tuple[GroupHeader, bytes]:
    """The two halves of a group on the wire."""
    trajectories = group.trajectories
    columns = (
        *(trajectory.token_ids.astype("<i4", copy=False) for trajectory in trajectories),
        *(trajectory.behavior_logprobs.astype("<f4", copy=False) for trajectory in trajectories),
        *(trajectory.loss_mask.astype(np.uint8) for trajectory in trajectories),
    )
    headers = tuple(
        TrajectoryHeader(
            num_tokens=len(trajectory),
            reward=trajectory.reward,
            terminated=trajectory.finish_reason is FinishReason.TERMINATED,
            turns=trajectory.turns,
            version_runs=tuple(trajectory.version_runs()),
            continues=trajectory.continues,
        )
        for trajectory in trajectories
    )
    header = GroupHeader(lease_id=group.lease_id, task_id=group.task_id, trajectories=headers)
    return header, b"".join(column.tobytes() for column in columns)


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The tokens of one trajectory after the other, of one group or several. N = all of them."""

    bounds: tuple[int, ...]  # trajectory i has the tokens bounds[i] to bounds[i + 1]
    token_ids_N: np.ndarray  # int32
    behavior_logprobs_N: np.ndarray  # float32
    loss_mask_N: np.ndarray  # bool

    def where(self, bad_N: np.ndarray) -> str:
        """The trajectory with the first bad token, for people."""
        return f"trajectory {bisect_right(self.bounds, int(bad_N.argmax())) - 1}"


def check_size(payload: Frame, num_tokens: int) -> None:
    """Raises ProtocolError unless the payload is of so many tokens."""
    if len(payload) != num_tokens * BYTES_PER_TOKEN:
        raise ProtocolError(
            f"payload: expected {num_tokens * BYTES_PER_TOKEN} bytes for {num_tokens} tokens, got {len(payload)}"
        )


def read_columns(trajectories: Sequence[TrajectoryHeader], payload: Frame) -> Columns:
    """Their tokens, each of them plausible by itself; raises ProtocolError unless headers and payload fit.

    The arrays are read-only, and views of the payload wherever they can be.
    """
    bounds = tuple(accumulate((trajectory.num_tokens for trajectory in trajectories), initial=0))
    count = bounds[-1]
    check_size(payload, count)
    payload = memoryview(payload).toreadonly()
    mask_N = np.frombuffer(payload, np.uint8, count, 8 * count)
    columns = Columns(
        bounds,
        np.frombuffer(payload, "<i4", count),
        np.frombuffer(payload, "<f4", count, 4 * count),
        mask_N.view(np.bool_),
    )
    if np.maximum.reduce(mask_N) > 1:
        raise ProtocolError(f"{columns.where(mask_N > 1)}.loss_mask: expected 0 or 1, got {mask_N[mask_N > 1][0]}")
    _check_token_ids(columns)
    _check_logprobs(columns)
    _check_version_runs(trajectories, columns)
    return columns


def _check_token_ids(columns: Columns) -> None:
    ids_N = columns.token_ids_N
    if np.minimum.reduce(ids_N) < 0:
        raise ProtocolError(f"{columns.where(ids_N < 0)}.token_ids: expected ids >= 0, got {ids_N[ids_N < 0][0]}")


def _check_logprobs(columns: Columns) -> None:
    logprobs_N = columns.behavior_logprobs_N
    highest, lowest = float(np.maximum.reduce(logprobs_N)), float(np.minimum.reduce(logprobs_N))  # NaN if there is one
    if not (math.isfinite(highest) and math.isfinite(lowest)):
        bad_N = ~np.isfinite(logprobs_N)
        where, value = columns.where(bad_N), logprobs_N[bad_N][0]
        raise ProtocolError(f"{where}.behavior_logprobs: expected finite values, got {value}")
    if highest > LOGPROB_SLACK:
        bad_N = logprobs_N > LOGPROB_SLACK
        where, value = columns.where(bad_N), logprobs_N[bad_N][0]
        raise ProtocolError(f"{where}.behavior_logprobs: expected values <= 0, got {value:g}")
    bad_N = np.greater(logprobs_N != 0, columns.loss_mask_N)
    if np.logical_or.reduce(bad_N):
        raise ProtocolError(f"{columns.where(bad_N)}.behavior_logprobs: expected 0 where no token was sampled")


def _check_version_runs(trajectories: Sequence[TrajectoryHeader], columns: Columns) -> None:
    for index, (start, end) in enumerate(pairwise(columns.bounds)):
        num_sampled = np.count_nonzero(columns.loss_mask_N[start:end])
        covered = sum([length for _, length in trajectories[index].version_runs])
        if num_sampled == 0:
            raise ProtocolError(f"trajectory {index}: expected at least one sampled token")
        if covered != num_sampled:
            raise ProtocolError(
                f"trajectory {index}.version_runs: expected to cover {num_sampled} sampled tokens, got {covered}"
            )


def unpack_groups(headers: Sequence[GroupHeader], payload: Frame) -> tuple[Group, ...]:
    """Groups whose halves are `headers` and `payload`; raises ProtocolError unless they fit each other exactly.

    The arrays are read-only, and views of the payload wherever they can be.
    """
    payload = memoryview(payload)
    num_tokens = [sum(trajectory.num_tokens for trajectory in header.trajectories) for header in headers]
    ends = list(accumulate((count * BYTES_PER_TOKEN for count in num_tokens), initial=0))
    if len(payload) != ends[-1]:
        raise ProtocolError(f"payload: expected {ends[-1]} bytes for {sum(num_tokens)} tokens, got {len(payload)}")
    return tuple(
        _unpack_group(header, payload[start:end]) for header, (start, end) in zip(headers, pairwise(ends), strict=True)
    )


def _unpack_group(header: GroupHeader, payload: memoryview) -> Group:
    columns = read_columns(header.trajectories, payload)
    logprobs_N = columns.behavior_logprobs_N
    if logprobs_N.max() > 0:  # by rounding
        logprobs_N = _read_only(np.minimum(logprobs_N, np.float32(0)))
    versions_N = _token_versions(header, columns.loss_mask_N)
    trajectories = tuple(
        Trajectory(
            token_ids=columns.token_ids_N[start:end],
            loss_mask=columns.loss_mask_N[start:end],
            behavior_logprobs=logprobs_N[start:end],
            token_versions=versions_N[start:end],
            reward=trajectory.reward,
            finish_reason=FinishReason.TERMINATED if trajectory.terminated else FinishReason.TRUNCATED,
            turns=trajectory.turns,
            continues=trajectory.continues,
        )
        for trajectory, (start, end) in zip(header.trajectories, pairwise(columns.bounds), strict=True)
    )
    return Group(lease_id=header.lease_id, task_id=header.task_id, trajectories=trajectories)


def _token_versions(header: GroupHeader, loss_mask_N: np.ndarray) -> np.ndarray:
    runs = [run for trajectory in header.trajectories for run in trajectory.version_runs]
    versions_R, lengths_R = np.array(runs, np.int32).T
    versions_N = np.full(loss_mask_N.size, NOT_SAMPLED, np.int32)
    versions_N[loss_mask_N] = np.repeat(versions_R, lengths_R)
    return _read_only(versions_N)


def _read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def check_group(header: GroupHeader, *, max_model_len: int, group_size: int, newest_version: int) -> None:
    """Raises ProtocolError unless the group is one this run can have asked for, as far as its header says."""
    num_episodes = sum([not trajectory.continues for trajectory in header.trajectories])
    if num_episodes != group_size or header.trajectories[0].continues:
        raise ProtocolError(f"group: expected {group_size} trajectories, got {num_episodes}")
    for index, trajectory in enumerate(header.trajectories):
        if trajectory.num_tokens > max_model_len:
            raise ProtocolError(
                f"trajectory {index}: expected at most {max_model_len} tokens, got {trajectory.num_tokens}"
            )
        if (newest := max(trajectory.version_runs)[0]) > newest_version:
            raise ProtocolError(f"trajectory {index}: sampled by version {newest}, the newest is {newest_version}")


def check_vocabulary(columns: Columns, vocab_size: int) -> None:
    """Raises ProtocolError unless the policy can have sampled these tokens."""
    ids_N = columns.token_ids_N
    if np.maximum.reduce(ids_N) >= vocab_size:
        bad_N = ids_N >= vocab_size
        raise ProtocolError(f"{columns.where(bad_N)}.token_ids: expected ids < {vocab_size}, got {ids_N[bad_N][0]}")
