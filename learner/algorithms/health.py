"""What tells a healthy run from a dying one: pure functions of a batch or a part of it, into metrics that merge.

Shape suffixes: B = trajectories, T = tokens (padded), N = trajectories of the batch, M = tokens trained on.
"""

import torch
from torch import Tensor

from learner.algorithms.metrics import (
    EffectiveShare,
    ExplainedVariance,
    Largest,
    Mean,
    Metric,
    Smallest,
    Spread,
    token_means,
)
from learner.algorithms.moments import Moments
from learner.algorithms.samples import bounded_log_ratio


def policy_health(
    logprobs_BT: Tensor,  # of the policy before the step
    behavior_logprobs_BT: Tensor,
    entropy_BT: Tensor,  # nats
    staleness_BT: Tensor,  # optimizer steps
    loss_mask_BT: Tensor,
) -> dict[str, Metric]:
    """Of the tokens that are trained on, with r = pi / mu, within e^-20 and e^20.

    mismatch_k1, _k3, _abs: means of -log r, of r - 1 - log r and of |log r| over tokens of staleness 0, where server
    and learner mean the same parameters: KL(mu || pi) twice estimated, rounding and no more in a healthy run.
    staleness_k1, _k3: the same over older tokens: how far the policy has moved since it sampled them.
    effective_sample_share: Kish's, of the weights r. ratio_mean, _min, _max: of r. entropy: the mean.
    """
    log_ratio_BT = bounded_log_ratio(logprobs_BT.detach(), behavior_logprobs_BT, loss_mask_BT)
    is_matched_BT = loss_mask_BT & (staleness_BT == 0)
    matched = token_means(_distances(log_ratio_BT) | {"abs": log_ratio_BT.abs()}, is_matched_BT)
    stale = token_means(_distances(log_ratio_BT), loss_mask_BT & ~is_matched_BT)
    ratios_M = log_ratio_BT[loss_mask_BT].exp()
    metrics = {f"mismatch_{name}": metric for name, metric in matched.items()}
    metrics |= {f"staleness_{name}": metric for name, metric in stale.items()}
    metrics |= token_means({"ratio_mean": log_ratio_BT.exp(), "entropy": entropy_BT}, loss_mask_BT)
    metrics["effective_sample_share"] = EffectiveShare(Moments.of(ratios_M))
    return metrics | _extremes("ratio", ratios_M)


def weight_health(weights_BT: Tensor, kept_BT: Tensor, loss_mask_BT: Tensor) -> dict[str, Metric]:
    """What corrections leave of the weights r: their mean, their largest, and Kish's share; 0 for what is left out."""
    weights_M = torch.where(kept_BT, weights_BT, 0.0)[loss_mask_BT]
    moments = Moments.of(weights_M)
    return {
        "weight_mean": Mean(moments.mean * moments.count, moments.count),
        "weight_max": _extremes("weight", weights_M)["weight_max"],
        "weight_effective_share": EffectiveShare(moments),
    }


def trajectory_health(
    rewards_N: Tensor, lengths_N: Tensor, terminated_N: Tensor, staleness_M: Tensor
) -> dict[str, Metric]:
    """Of trajectories as they came: rewards, sampled tokens, the share that was cut off, steps a token is old."""
    rewards, count = Moments.of(rewards_N), float(len(rewards_N))
    return {
        "reward": Mean(float(rewards_N.double().sum()), count),
        "reward_std": Spread(rewards),
        "length_mean": Mean(float(lengths_N.sum()), count),
        "truncated": Mean(float((~terminated_N).sum()), count),
        "staleness_mean": Mean(float(staleness_M.sum()), float(len(staleness_M))),
        **_extremes("length", lengths_N),
        **_extremes("staleness", staleness_M),
    }


def advantage_health(advantages_M: Tensor) -> dict[str, Metric]:
    """Mean, standard deviation and extremes. A deviation of 0 says that there is nothing to learn from."""
    moments = Moments.of(advantages_M)
    return {
        "advantage_mean": Mean(moments.mean * moments.count, moments.count),
        "advantage_std": Spread(moments),
        **_extremes("advantage", advantages_M),
    }


def critic_health(returns_M: Tensor, values_M: Tensor) -> dict[str, Metric]:
    """Of the critic before the step: the share of the variance of returns that its values explain."""
    return {"explained_variance": ExplainedVariance(Moments.of(returns_M), Moments.of(returns_M - values_M))}


def _distances(log_ratio_BT: Tensor) -> dict[str, Tensor]:
    """KL(mu || pi) at tokens that mu sampled, r = pi / mu: Schulman 2020, joschu.net/blog/kl-approx.html."""
    return {"k1": -log_ratio_BT, "k3": torch.expm1(log_ratio_BT) - log_ratio_BT}


def _extremes(name: str, values_M: Tensor) -> dict[str, Metric]:
    if not len(values_M):
        return {f"{name}_min": Smallest(), f"{name}_max": Largest()}
    least, most = torch.stack([values_M.min(), values_M.max()]).tolist()
    return {f"{name}_min": Smallest(least), f"{name}_max": Largest(most)}
