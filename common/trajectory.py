"""Trajectory and Group: sampled tokens together with the evidence of the policy that sampled them."""

from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise

import numpy as np

from common.staleness import NOT_SAMPLED, oldest_version


class FinishReason(Enum):
    """Why a trajectory ended. A truncated one did not reach its end: a critic may bootstrap from it."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One episode as one growing list of token ids. T = prompt + sampled + environment tokens."""

    token_ids: np.ndarray  # [T] int32
    loss_mask: np.ndarray  # [T] bool; True where the policy sampled the token
    behavior_logprobs: np.ndarray  # [T] float32; log mu of the sampled token, 0 where loss_mask is False
    token_versions: np.ndarray  # [T] int32; policy version that sampled the token, NOT_SAMPLED elsewhere
    reward: float
    finish_reason: FinishReason
    turns: int = 1
    continues: bool = False  # the episode of the trajectory before it in its group, after a fork; same reward

    def __len__(self) -> int:
        return int(self.token_ids.size)

    @property
    def num_sampled_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int:
        return oldest_version(self.token_versions)

    @property
    def num_bytes(self) -> int:
        return (
            self.token_ids.nbytes + self.loss_mask.nbytes + self.behavior_logprobs.nbytes + self.token_versions.nbytes
        )

    def version_runs(self) -> list[tuple[int, int]]:
        """token_versions of the sampled tokens as (version, length) runs, in order."""
        sampled = self.token_versions[self.token_versions != NOT_SAMPLED]
        if sampled.size == 0:
            return []
        changes = np.flatnonzero(sampled[1:] != sampled[:-1]) + 1
        bounds = [0, *changes.tolist(), int(sampled.size)]
        return [(int(sampled[start]), end - start) for start, end in pairwise(bounds)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """The trajectories of one task, sampled from the same prompt under one lease."""

    lease_id: int
    task_id: int
    trajectories: tuple[Trajectory, ...]

    @cached_property
    def num_bytes(self) -> int:
        return sum(trajectory.num_bytes for trajectory in self.trajectories)

    @cached_property
    def num_sampled_tokens(self) -> int:
        return sum(trajectory.num_sampled_tokens for trajectory in self.trajectories)

    @cached_property
    def oldest_version(self) -> int:
        return min(trajectory.oldest_version for trajectory in self.trajectories)

    @cached_property
    def newest_version(self) -> int:
        return max(int(trajectory.token_versions.max()) for trajectory in self.trajectories)
