"""Groups as simulated servers sample them: two trajectories, and the first prompt is a number that no other group has.

The second trajectory has one sampled token, of the same version as the last of the first.
"""

import struct
from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from common.codec import BYTES_PER_TOKEN
from common.messages import GroupHeader, TrajectoryHeader

Runs = tuple[tuple[int, int], ...]  # (version, number of tokens)

_nonce = struct.Struct("<i")


def header_of(lease_id: int, task_id: int, runs: Runs, *, is_equal: bool) -> GroupHeader:
    """is_equal: both trajectories have the same reward."""
    last = ((runs[-1][0], 1),)
    trajectories = tuple(
        TrajectoryHeader(
            num_tokens=1 + sum(length for _, length in each), reward=reward, terminated=True, turns=1, version_runs=each
        )
        for each, reward in ((runs, 0.0), (last, 0.0 if is_equal else 1.0))
    )
    return GroupHeader(lease_id=lease_id, task_id=task_id, trajectories=trajectories)


def payload_of(nonce: int, num_sampled: int, *, logprob: float = -0.5) -> bytes:
    """The nonce as the prompt, then num_sampled tokens of the same log-probability; and the second trajectory."""
    return _nonce.pack(nonce) + _rest_of_payload(num_sampled, logprob)


@cache
def _rest_of_payload(num_sampled: int, logprob: float) -> bytes:
    token_ids = struct.pack("<i", 1) * (num_sampled + 2)
    logprobs = struct.pack("<f", 0.0) + struct.pack("<f", logprob) * num_sampled + struct.pack("<2f", 0.0, -0.5)
    return token_ids + logprobs + b"\0" + b"\1" * num_sampled + b"\0\1"


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


def nonces_together(headers: Sequence[GroupHeader], payload: bytes) -> tuple[int, ...]:
    """Of groups that were sent in one message, in order."""
    num_tokens = (sum(trajectory.num_tokens for trajectory in header.trajectories) for header in headers)
    starts = accumulate(num_tokens, initial=0)
    return tuple(nonce_of(payload, 4 * start) for _, start in zip(headers, starts, strict=False))


def runs_of(versions: Sequence[int]) -> Runs:
    """Of the sampled tokens' versions, in order."""
    runs: list[tuple[int, int]] = []
    for version in versions:
        if runs and runs[-1][0] == version:
            runs[-1] = (version, runs[-1][1] + 1)
        else:
            runs.append((version, 1))
    return tuple(runs)
