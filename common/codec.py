"""Messages to frames and back. Everything that comes off the wire is doubted here, and nowhere after.

A message is exactly two frames: the MessagePack header and the payload. The payload of a group is, for each of its
trajectories in order, with T its number of tokens:

    token_ids [T] int32, behavior_logprobs [T] float32, loss_mask [T] uint8 (0 or 1), all little-endian, no padding

token_versions are not in the payload: the header has them as runs over the sampled tokens.
"""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from common.messages import (
    Batch,
    ChunkReply,
    GroupFinished,
    GroupHeader,
    ManifestReply,
    Message,
    SnapshotWritten,
    TrajectoryHeader,
)
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory

Frame = bytes | memoryview
Frames = list[Frame]

BYTES_PER_TOKEN = 4 + 4 + 1
LOGPROB_SLACK = 1e-4  # float32 log-softmax may exceed 0 by rounding; more than this is no rounding
MAX_QUOTED_CHARS = 200

_WITH_PAYLOAD = (GroupFinished, Batch, ManifestReply, ChunkReply, SnapshotWritten)
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
        if len(payload) and not isinstance(message, _WITH_PAYLOAD):
            raise ProtocolError(f"{type(message).__name__} carries no payload, got {len(payload)} bytes")
        return message, memoryview(payload).toreadonly()


def _printable(text: str) -> str:
    """The peer's own words may be in it: no control characters and no long lines for our log."""
    return "".join(character if character.isprintable() else "?" for character in text[:MAX_QUOTED_CHARS])


def pack_group(group: Group) -> tuple[GroupHeader, bytes]:
    """The two halves of a group on the wire."""
    parts: list[bytes] = []
    for trajectory in group.trajectories:
        parts.append(trajectory.token_ids.astype("<i4", copy=False).tobytes())
        parts.append(trajectory.behavior_logprobs.astype("<f4", copy=False).tobytes())
        parts.append(trajectory.loss_mask.astype(np.uint8).tobytes())
    headers = tuple(
        TrajectoryHeader(
            num_tokens=len(trajectory),
            reward=trajectory.reward,
            terminated=trajectory.finish_reason is FinishReason.TERMINATED,
            turns=trajectory.turns,
            version_runs=tuple(trajectory.version_runs()),
        )
        for trajectory in group.trajectories
    )
    return GroupHeader(lease_id=group.lease_id, task_id=group.task_id, trajectories=headers), b"".join(parts)


def unpack_groups(headers: Sequence[GroupHeader], payload: Frame) -> tuple[Group, ...]:
    """Groups whose halves are `headers` and `payload`; raises ProtocolError unless they fit each other exactly.

    The arrays are read-only, and views of the payload wherever they can be.
    """
    payload = memoryview(payload).toreadonly()
    num_tokens = sum(trajectory.num_tokens for header in headers for trajectory in header.trajectories)
    if len(payload) != num_tokens * BYTES_PER_TOKEN:
        raise ProtocolError(
            f"payload: expected {num_tokens * BYTES_PER_TOKEN} bytes for {num_tokens} tokens, got {len(payload)}"
        )
    offset = 0
    groups: list[Group] = []
    for header in headers:
        trajectories: list[Trajectory] = []
        for index, trajectory in enumerate(header.trajectories):
            trajectories.append(_unpack_trajectory(trajectory, payload, offset, f"trajectory {index}"))
            offset += trajectory.num_tokens * BYTES_PER_TOKEN
        groups.append(Group(lease_id=header.lease_id, task_id=header.task_id, trajectories=tuple(trajectories)))
    return tuple(groups)


def _unpack_trajectory(header: TrajectoryHeader, payload: Frame, offset: int, where: str) -> Trajectory:
    count = header.num_tokens
    token_ids = np.frombuffer(payload, "<i4", count, offset)
    logprobs = np.frombuffer(payload, "<f4", count, offset + 4 * count)
    mask = np.frombuffer(payload, np.uint8, count, offset + 8 * count)
    if mask.max() > 1:
        raise ProtocolError(f"{where}.loss_mask: expected 0 or 1, got {mask.max()}")
    loss_mask = mask.view(np.bool_)
    if token_ids.min() < 0:
        raise ProtocolError(f"{where}.token_ids: expected ids >= 0, got {token_ids.min()}")
    return Trajectory(
        token_ids=token_ids,
        loss_mask=loss_mask,
        behavior_logprobs=_checked_logprobs(logprobs, loss_mask, where),
        token_versions=_token_versions(header, loss_mask, where),
        reward=header.reward,
        finish_reason=FinishReason.TERMINATED if header.terminated else FinishReason.TRUNCATED,
        turns=header.turns,
    )


def _checked_logprobs(logprobs: np.ndarray, loss_mask: np.ndarray, where: str) -> np.ndarray:
    if not np.isfinite(logprobs).all():
        raise ProtocolError(
            f"{where}.behavior_logprobs: expected finite values, got {logprobs[~np.isfinite(logprobs)][0]}"
        )
    if logprobs.max() > LOGPROB_SLACK:
        raise ProtocolError(f"{where}.behavior_logprobs: expected values <= 0, got {logprobs.max():g}")
    if logprobs[~loss_mask].any():
        raise ProtocolError(f"{where}.behavior_logprobs: expected 0 where no token was sampled")
    if logprobs.max() <= 0:
        return logprobs
    rounded: np.ndarray = np.minimum(logprobs, np.float32(0))
    rounded.setflags(write=False)
    return rounded


def _token_versions(header: TrajectoryHeader, loss_mask: np.ndarray, where: str) -> np.ndarray:
    num_sampled = int(loss_mask.sum())
    versions = [version for version, _ in header.version_runs]
    lengths = [length for _, length in header.version_runs]
    if num_sampled == 0:
        raise ProtocolError(f"{where}: expected at least one sampled token")
    if sum(lengths) != num_sampled:
        raise ProtocolError(f"{where}.version_runs: expected to cover {num_sampled} sampled tokens, got {sum(lengths)}")
    token_versions = np.full(loss_mask.size, NOT_SAMPLED, np.int32)
    token_versions[loss_mask] = np.repeat(np.array(versions, np.int32), lengths)
    token_versions.setflags(write=False)
    return token_versions


def check_group(group: Group, *, vocab_size: int, max_model_len: int, group_size: int, newest_version: int) -> None:
    """Raises ProtocolError unless the group is one this run can have asked for."""
    if len(group.trajectories) != group_size:
        raise ProtocolError(f"group: expected {group_size} trajectories, got {len(group.trajectories)}")
    for index, trajectory in enumerate(group.trajectories):
        if len(trajectory) > max_model_len:
            raise ProtocolError(f"trajectory {index}: expected at most {max_model_len} tokens, got {len(trajectory)}")
        if (largest := int(trajectory.token_ids.max())) >= vocab_size:
            raise ProtocolError(f"trajectory {index}.token_ids: expected ids < {vocab_size}, got {largest}")
        if (newest := int(trajectory.token_versions.max())) > newest_version:
            raise ProtocolError(f"trajectory {index}: sampled by version {newest}, the newest is {newest_version}")
