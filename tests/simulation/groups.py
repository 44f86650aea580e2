"""Groups as simulated servers sample them: one trajectory, whose prompt is a number that no other group has."""

import struct
from collections.abc import Sequence
from functools import cache

from common.codec import BYTES_PER_TOKEN
from common.messages import GroupHeader, TrajectoryHeader

Runs = tuple[tuple[int, int], ...]  # (version, number of tokens)

_nonce = struct.Struct("<i")


def header_of(lease_id: int, task_id: int, runs: Runs) -> GroupHeader:
    num_tokens = 1 + sum(length for _, length in runs)
    trajectory = TrajectoryHeader(num_tokens=num_tokens, reward=0.0, terminated=True, turns=1, version_runs=runs)
    return GroupHeader(lease_id=lease_id, task_id=task_id, trajectories=(trajectory,))


def payload_of(nonce: int, num_sampled: int, *, logprob: float = -0.5) -> bytes:
    """The nonce as the prompt, then num_sampled tokens of the same log-probability."""
    return _nonce.pack(nonce) + _rest_of_payload(num_sampled, logprob)


@cache
def _rest_of_payload(num_sampled: int, logprob: float) -> bytes:
    token_ids = struct.pack("<i", 1) * num_sampled
    logprobs = struct.pack("<f", 0.0) + struct.pack("<f", logprob) * num_sampled
    return token_ids + logprobs + b"\0" + b"\1" * num_sampled


def nonce_of(payload: bytes, offset: int = 0) -> int:
    """-1 for a payload that has none."""
    return int(_nonce.unpack_from(payload, offset)[0]) if len(payload) >= offset + _nonce.size else -1


def nonces_of(headers: Sequence[GroupHeader], payload: bytes) -> tuple[int, ...]:
    """Of the groups of a batch, in order."""
    nonces, offset = [], 0
    for header in headers:
        nonces.append(nonce_of(payload, offset))
        offset += BYTES_PER_TOKEN * sum(trajectory.num_tokens for trajectory in header.trajectories)
    return tuple(nonces)


def runs_of(versions: Sequence[int]) -> Runs:
    """Of the sampled tokens' versions, in order."""
    runs: list[tuple[int, int]] = []
    for version in versions:
        if runs and runs[-1][0] == version:
            runs[-1] = (version, runs[-1][1] + 1)
        else:
            runs.append((version, 1))
    return tuple(runs)
