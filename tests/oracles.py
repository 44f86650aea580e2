"""The formulas of the papers as slow Python loops: one loop per summation sign, no tensors, no masks multiplied.

Arguments are lists of rows of floats; `mask` says which tokens the policy sampled.
"""

import math
from collections.abc import Sequence
from statistics import fmean

Row = Sequence[float]
Rows = Sequence[Row]
Mask = Sequence[Sequence[bool]]


def sampled_places(mask: Mask) -> list[tuple[int, int]]:
    return [(b, t) for b, row in enumerate(mask) for t, sampled in enumerate(row) if sampled]


def clipped_surrogate(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def ppo(current: Rows, behavior: Rows, advantages: Rows, mask: Mask, *, tokens: int, low: float, high: float) -> float:
    """Schulman et al. 2017, equation 7, as a loss."""
    total = 0.0
    for b, t in sampled_places(mask):
        ratio = math.exp(current[b][t] - behavior[b][t])
        total += clipped_surrogate(ratio, advantages[b][t], low, high)
    return -total / tokens


def decoupled_ppo(
    current: Rows, proximal: Rows, behavior: Rows, advantages: Rows, mask: Mask,
    *, tokens: int, low: float, high: float, largest_weight: float,
) -> float:  # fmt: skip
    """Hilton et al. 2021, equation 2, with the importance weight truncated, as a loss."""
    total = 0.0
    for b, t in sampled_places(mask):
        weight = min(math.exp(proximal[b][t] - behavior[b][t]), largest_weight)
        ratio = math.exp(current[b][t] - proximal[b][t])
        total += weight * clipped_surrogate(ratio, advantages[b][t], low, high)
    return -total / tokens


def decoupled_ppo_metrics(
    current: Rows, proximal: Rows, behavior: Rows, advantages: Rows, mask: Mask,
    *, low: float, high: float, largest_weight: float,
) -> dict[str, float]:  # fmt: skip
    """Sums over the sampled tokens."""
    names = ("clip_fraction", "behavior_weight", "behavior_weight_squared", "behavior_weight_truncated", "staleness_kl")
    sums = dict.fromkeys(names, 0.0)
    for b, t in sampled_places(mask):
        weight = math.exp(proximal[b][t] - behavior[b][t])
        ratio, advantage = math.exp(current[b][t] - proximal[b][t]), advantages[b][t]
        pushed_out = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        sums["clip_fraction"] += pushed_out
        sums["behavior_weight"] += weight
        sums["behavior_weight_squared"] += weight**2
        sums["behavior_weight_truncated"] += weight > largest_weight
        sums["staleness_kl"] += weight - 1 - math.log(weight)
    return sums


def value(values: Rows, old_values: Rows, returns: Rows, mask: Mask, *, tokens: int, clip: float) -> float:
    """Half the larger of two squared errors, as in the code published with PPO."""
    total = 0.0
    for b, t in sampled_places(mask):
        step = min(max(values[b][t] - old_values[b][t], -clip), clip)
        total += max((values[b][t] - returns[b][t]) ** 2, (old_values[b][t] + step - returns[b][t]) ** 2)
    return 0.5 * total / tokens


def group_relative(rewards: Row, group_of: Sequence[int], *, normalize: bool, epsilon: float) -> list[float]:
    """GRPO: arXiv:2402.03300, section 4.1.2."""
    advantages = []
    for reward, group in zip(rewards, group_of, strict=True):
        peers = [peer for peer, its_group in zip(rewards, group_of, strict=True) if its_group == group]
        centered = reward - fmean(peers)
        squares = sum((peer - fmean(peers)) ** 2 for peer in peers)
        std = math.sqrt(squares / (len(peers) - 1)) if len(peers) > 1 else 0.0
        advantages.append(centered / (std + epsilon) if normalize else centered)
    return advantages


def generalized(
    values: Row, reward: float, mask: Sequence[bool], *, terminated: bool, gamma: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """(advantages, returns) of one trajectory: Schulman et al. 2015, equation 16, over its sampled tokens alone.

    The sum over l of (gamma lambda)^l delta_{t+l}, written out for every t.
    """
    places = [t for t, sampled in enumerate(mask) if sampled]
    deltas = []
    for k, t in enumerate(places):
        is_last = k + 1 == len(places)
        following = values[places[k + 1]] if not is_last else (0.0 if terminated else values[t])
        deltas.append((reward if is_last else 0.0) + gamma * following - values[t])
    advantages, returns = [0.0] * len(mask), [0.0] * len(mask)
    for k, t in enumerate(places):
        advantages[t] = sum((gamma * gae_lambda) ** (j - k) * deltas[j] for j in range(k, len(places)))
        returns[t] = advantages[t] + values[t]
    return advantages, returns
