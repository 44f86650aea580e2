"""Corrections: what is done about tokens that another policy sampled than the one being trained.

A correction is a pure function from the evidence and the importance weights so far to weights, a mask and metrics.
They are applied in the order given. Each judges by the same evidence, and a token stays only if all keep it, so the
order matters for the weights alone. Shape suffixes: B = trajectories, T = tokens (padded).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from learner.algorithms.metrics import Metric, Metrics, token_means
from learner.algorithms.samples import MAX_LOG_RATIO, per_trajectory
from learner.algorithms.settings import Setting

MaxWeight = Annotated[float, Setting("larger weights are taken for this", more_than=0)]
Low = Annotated[float, Setting("what has a smaller ratio is left out", at_least=0, at_most=1)]
High = Annotated[float, Setting("what has a larger ratio is left out", at_least=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a correction judges by. A row is one whole trajectory; nothing carries grad."""

    log_ratio_BT: Tensor  # log pi_prox / mu, within plus and minus 20; 0 outside the mask
    advantages_BT: Tensor  # 0 outside the mask
    mask_BT: Tensor  # bool; the tokens that are trained on, but for corrections


@dataclass(frozen=True, slots=True)
class Correction:
    weights_BT: Tensor
    kept_BT: Tensor  # bool
    metrics: Metrics


Correct = Callable[[Evidence, Tensor], Correction]


def apply_corrections(corrections: Mapping[str, Correct], evidence: Evidence) -> Correction:
    """All of them, in order, from the importance weights pi_prox / mu on.

    Metrics carry the correction's name; masked_fraction is of all of them together.
    """
    weights_BT, kept_BT = evidence.log_ratio_BT.exp(), evidence.mask_BT
    metrics: dict[str, Metric] = {}
    for name, correct in corrections.items():
        correction = correct(evidence, weights_BT)
        weights_BT, kept_BT = correction.weights_BT, kept_BT & correction.kept_BT
        metrics |= {f"{name}_{metric}": value for metric, value in correction.metrics.items()}
    metrics |= token_means({"masked_fraction": ~kept_BT}, evidence.mask_BT)
    return Correction(weights_BT, kept_BT, metrics)


def truncate_tokens(evidence: Evidence, weights_BT: Tensor, *, max_weight: MaxWeight = 2.0) -> Correction:
    """Weights of tokens up to a bound: truncated importance sampling, Ionides 2008.

    Between inference and training engines: Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training".
    """
    return _weigh(evidence, weights_BT.clamp(max=max_weight), truncated=weights_BT > max_weight)


def truncate_sequences(evidence: Evidence, weights_BT: Tensor, *, max_weight: MaxWeight = 5.0) -> Correction:
    """Every token weighs as its whole trajectory does, the product of ratios, up to a bound.

    Unbiased but for the bound, and of high variance: a product over hundreds of tokens is seldom near 1.
    """
    sums_B1, _ = per_trajectory(evidence.log_ratio_BT, evidence.mask_BT)
    sequence_BT = sums_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().expand_as(weights_BT)
    return _weigh(evidence, sequence_BT.clamp(max=max_weight), truncated=sequence_BT > max_weight)


def taper(evidence: Evidence, weights_BT: Tensor, *, max_weight: MaxWeight = 1.0) -> Correction:
    """Rewarded tokens weigh 1 however unlikely they have become, all others at most a bound: tapered REINFORCE.

    TOPR, Le Roux et al. 2025, arXiv:2503.14286, with a token's ratio for the trajectory's. Praise weighted with a small
    ratio could not bring back what the policy has lost, and blame weighted with a large one would not fade in time.
    """
    praise_BT = weights_BT.clamp(1.0, 1.0)  # what is not a number stays so, to be noticed
    tapered_BT = torch.where(evidence.advantages_BT > 0, praise_BT, weights_BT.clamp(max=max_weight))
    return _weigh(evidence, tapered_BT, truncated=tapered_BT != weights_BT)


def unweighted(evidence: Evidence, weights_BT: Tensor) -> Correction:
    """All tokens weigh 1, whoever sampled them: to see what weights are good for, or to use masks alone."""
    return _weigh(evidence, torch.ones_like(weights_BT))


def icepop(evidence: Evidence, weights_BT: Tensor, *, low: Low = 0.5, high: High = 5.0) -> Correction:
    """Tokens whose ratio is out of range are left out, the others weighted: IcePop, arXiv:2510.18855."""
    return _keep(evidence, weights_BT, _is_within(evidence.log_ratio_BT, low, high))


def geometric_mask(evidence: Evidence, weights_BT: Tensor, *, low: Low = 0.99, high: High = 1.01) -> Correction:
    """Trajectories are left out whose ratio, as geometric mean over their tokens, is out of range.

    Whatever their length: Liu et al. 2025, "When speed kills stability: demystifying RL collapse from the
    training-inference mismatch".
    """
    _, means_B1 = per_trajectory(evidence.log_ratio_BT, evidence.mask_BT)
    return _keep(evidence, weights_BT, _is_within(means_B1, low, high))


def product_mask(evidence: Evidence, weights_BT: Tensor, *, low: Low = 0.5, high: High = 2.0) -> Correction:
    """Trajectories are left out whose ratio, as product over their tokens, is out of range.

    The longer they are, the more of them: see geometric_mask.
    """
    sums_B1, _ = per_trajectory(evidence.log_ratio_BT, evidence.mask_BT)
    return _keep(evidence, weights_BT, _is_within(sums_B1, low, high))


def veto(
    evidence: Evidence,
    weights_BT: Tensor,
    *,
    min_ratio: Annotated[
        float, Setting("a trajectory with one smaller ratio is left out", at_least=0, at_most=1)
    ] = 1e-4,
) -> Correction:
    """Trajectories are left out that have a token the policy would all but never sample: see geometric_mask."""
    least_B1 = evidence.log_ratio_BT.amin(dim=1, keepdim=True)  # 0 outside the mask
    return _keep(evidence, weights_BT, _is_within(least_B1, min_ratio, math.inf))


def opsm(
    evidence: Evidence,
    weights_BT: Tensor,
    *,
    max_kl: Annotated[
        float, Setting("nats per token; what is further away and punished is left out", at_least=0)
    ] = 1e-4,
) -> Correction:
    """Punished trajectories far from the policy are left out: off-policy sequence masking, arXiv:2512.02556.

    DeepSeek-V3.2: the mean over a trajectory of log mu / pi_prox above max_kl, and a negative advantage, which is a
    token's own where they differ. Learning from others' mistakes one would not make is what derails.
    """
    _, means_B1 = per_trajectory(evidence.log_ratio_BT, evidence.mask_BT)
    return _keep(evidence, weights_BT, ~((evidence.advantages_BT < 0) & (-means_B1 > max_kl)))


def _is_within(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """Bounds count as within, and so does nan, to be noticed. In logarithms, where long products do not overflow."""
    return ~((log_ratio < (math.log(low) if low else -math.inf)) | (log_ratio > math.log(high)))


def _weigh(evidence: Evidence, weights_BT: Tensor, **shares_BT: Tensor) -> Correction:
    """shares_BT: bool; of the tokens, where something happened."""
    metrics = token_means(shares_BT, evidence.mask_BT) if shares_BT else {}
    return Correction(weights_BT, torch.ones_like(evidence.mask_BT), metrics)


def _keep(evidence: Evidence, weights_BT: Tensor, kept: Tensor) -> Correction:
    """kept: [B, T], or [B, 1] for whole trajectories."""
    kept_BT = kept.expand_as(evidence.mask_BT)
    return Correction(weights_BT, kept_BT, token_means({"masked": ~kept_BT}, evidence.mask_BT))
