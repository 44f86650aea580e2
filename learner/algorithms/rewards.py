"""What becomes of rewards before advantages are made of them. Pure functions. N = trajectories of the global batch."""

import torch
from torch import Tensor

from learner.algorithms.advantages import equal_in_group


def overlong_penalties(lengths_N: Tensor, *, max_length: int, buffer: int, penalty: float = 1.0) -> Tensor:
    """Soft overlong punishment, added to the reward: DAPO (arXiv:2503.14476), equation 13. float32, 0 or less.

    Nothing up to max_length - buffer sampled tokens, then linearly more, `penalty` at max_length and beyond.
    """
    over_N = (lengths_N - (max_length - buffer)).float()
    return -penalty * (over_N / buffer).clamp(0.0, 1.0)


def clip_rewards(rewards_N: Tensor, *, limit: float) -> Tensor:
    """Into [-limit, limit]; what is not finite stays as it is, to be noticed."""
    return torch.where(rewards_N.isfinite(), rewards_N.clamp(-limit, limit), rewards_N)


def share_of_equal_groups(rewards_N: Tensor, group_index_N: Tensor) -> float:
    """Of the groups, how many have equal rewards: relative to the group they teach nothing (DAPO, section 3.2)."""
    equal_groups = group_index_N[equal_in_group(rewards_N, group_index_N)].unique()
    return float(equal_groups.numel() / group_index_N.unique().numel())
