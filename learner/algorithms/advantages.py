"""Advantages: how much better than expected a trajectory, or a token, was. Pure functions.

Shape suffixes: N = trajectories of a batch, B = trajectories of a micro-batch, T = tokens (padded).
"""

import torch
from torch import Tensor


def group_relative_advantages(
    rewards_N: Tensor,
    group_index_N: Tensor,  # int64; trajectories of one task share an index
    *,
    normalize_std: float = 1.0,
    epsilon: float = 1e-6,
) -> Tensor:
    """Reward minus the mean of its group, over the group's standard deviation: GRPO, arXiv:2402.03300, equation 4.1.2.

    normalize_std 0 leaves the deviation out, which does not favour tasks that are nearly solved or nearly hopeless
    (Dr. GRPO, arXiv:2503.20783). A group of one, or of equal rewards, has advantage 0: it says nothing.
    """
    num_groups = int(group_index_N.max()) + 1
    count_G = torch.zeros(num_groups, dtype=rewards_N.dtype).index_add_(0, group_index_N, torch.ones_like(rewards_N))
    total_G = torch.zeros_like(count_G).index_add_(0, group_index_N, rewards_N)
    least_G = torch.zeros_like(count_G).scatter_reduce_(0, group_index_N, rewards_N, "amin", include_self=False)
    most_G = torch.zeros_like(count_G).scatter_reduce_(0, group_index_N, rewards_N, "amax", include_self=False)
    # Equal rewards differ from their mean by a rounding error, which dividing by the deviation would blow up.
    centered_N = torch.where((least_G == most_G)[group_index_N], 0.0, rewards_N - (total_G / count_G)[group_index_N])
    if not normalize_std:
        return centered_N
    squares_G = torch.zeros_like(count_G).index_add_(0, group_index_N, centered_N.square())
    std_G = (squares_G / (count_G - 1).clamp(min=1)).sqrt()
    return centered_N / (std_G[group_index_N] + epsilon)


def generalized_advantages(
    values_BT: Tensor,  # V of the state before each token
    rewards_B: Tensor,  # of the whole trajectory, given at its last sampled token
    loss_mask_BT: Tensor,  # bool; True where the policy sampled the token
    terminated_B: Tensor,  # bool; False: truncated, there would have been more
    *,
    gamma: float = 1.0,
    gae_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(advantages_BT, returns_BT) by GAE, Schulman et al. 2015 (arXiv:1506.02438), equation 16.

    Time runs over sampled tokens only: environment tokens in between are neither discounted across nor valued. After
    the last sampled token a terminated trajectory is worth 0; a truncated one is bootstrapped with that token's value.
    """
    advantages_BT = torch.zeros_like(values_BT)
    num_rows, num_tokens = values_BT.shape
    next_value_B = torch.zeros(num_rows, dtype=values_BT.dtype, device=values_BT.device)
    running_B = torch.zeros_like(next_value_B)
    seen_B = torch.zeros(num_rows, dtype=torch.bool, device=values_BT.device)
    for t in reversed(range(num_tokens)):
        sampled_B = loss_mask_BT[:, t]
        value_B = values_BT[:, t]
        is_last_B = sampled_B & ~seen_B
        bootstrap_B = torch.where(terminated_B, 0.0, value_B)
        following_B = torch.where(is_last_B, bootstrap_B, next_value_B)
        reward_B = torch.where(is_last_B, rewards_B, 0.0)
        delta_B = reward_B + gamma * following_B - value_B
        advantage_B = delta_B + gamma * gae_lambda * running_B
        advantages_BT[:, t] = torch.where(sampled_B, advantage_B, 0.0)
        running_B = torch.where(sampled_B, advantage_B, running_B)
        next_value_B = torch.where(sampled_B, value_B, next_value_B)
        seen_B = seen_B | sampled_B
    return advantages_BT, torch.where(loss_mask_BT, advantages_BT + values_BT, 0.0)
