"""Losses: one pure function each. Shape suffixes: B = trajectories, T = tokens (padded).

A policy loss says what each token costs; what share of the whole a token has is said by an aggregation. Where a loss
holds the policy near mu by itself, its ratios are pi_theta / mu: one token's importance and distance in one. The
weighted ones, decoupled PPO and REINFORCE, leave importance to the corrections, which make samples.weights_BT.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from learner.algorithms.metrics import Metrics, token_means
from learner.algorithms.samples import (
    MAX_LOG_RATIO,
    BatchRatios,
    Samples,
    bounded_log_ratio,
    masked_log_ratio,
    per_trajectory,
)
from learner.algorithms.settings import Setting

__all__ = ["LossOutput", "TokenLosses", "masked_log_ratio"]

ClipRatio = Annotated[float, Setting("ratios below 1 - this are clipped", at_least=0, at_most=1)]
ClipRatioHigh = Annotated[float, Setting("ratios above 1 + this are clipped", at_least=0)]
DualClip = Annotated[
    float, Setting("where the advantage is negative, ratios above this are clipped too; inf: none", more_than=1)
]
MaxWeight = Annotated[float, Setting("larger ratios are taken for this", more_than=0)]


@dataclass(frozen=True, slots=True)
class TokenLosses:
    losses_BT: Tensor  # carries grad; 0 outside the mask
    metrics: Metrics


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss that already is the share of a micro-batch in the whole."""

    loss: Tensor  # scalar, carries grad
    metrics: dict[str, float]  # sums over the loss tokens; divided by their global number they are means


def ppo_loss(
    samples: Samples,
    *,
    clip_ratio: ClipRatio = 0.2,
    clip_ratio_high: ClipRatioHigh = 0.2,
    dual_clip: DualClip = math.inf,
) -> TokenLosses:
    """PPO clipped around the behavior policy: arXiv:1707.06347, equation 7.

    Two policies: what sampled the tokens is also the centre of the trust region; pi_prox is not used. DAPO's
    clip-higher (arXiv:2503.14476) is a clip_ratio_high above clip_ratio; dual_clip is c of arXiv:1912.09729.
    """
    ratio_BT = samples.ratio_to(samples.behavior_logprobs_BT)
    surrogate_BT, is_clipped_BT = _clipped_surrogate(ratio_BT, samples, clip_ratio, clip_ratio_high, dual_clip)
    return _token_losses(samples, -surrogate_BT, clip_fraction=is_clipped_BT)


def decoupled_ppo_loss(
    samples: Samples,
    *,
    clip_ratio: ClipRatio = 0.2,
    clip_ratio_high: ClipRatioHigh = 0.28,
    dual_clip: DualClip = math.inf,
) -> TokenLosses:
    """PPO clipped around a recent policy, importance-weighted back to the behavior policy: arXiv:2110.00641.

    Hilton et al. 2021, equation 2, with the weights pi_prox / mu as the corrections leave them, and the asymmetric
    clip range of DAPO (arXiv:2503.14476). With pi_prox == mu it is plain PPO.
    """
    ratio_BT = samples.ratio_to(samples.proximal_logprobs_BT)
    surrogate_BT, is_clipped_BT = _clipped_surrogate(ratio_BT, samples, clip_ratio, clip_ratio_high, dual_clip)
    weights_BT = samples.masked(samples.weights_BT).detach()
    return _token_losses(samples, -weights_BT * surrogate_BT, clip_fraction=is_clipped_BT)


def gspo_loss(samples: Samples, *, clip_ratio: ClipRatio = 3e-4, clip_ratio_high: ClipRatioHigh = 4e-4) -> TokenLosses:
    """PPO on the geometric mean of a trajectory's ratios: GSPO, arXiv:2507.18071.

    The token form, section 4.3: the ratio of a token has the value of the trajectory's and the gradient of its own.
    With one advantage per trajectory and aggregation sequence_mean it is equation 5.
    """
    log_ratio_BT = bounded_log_ratio(samples.current_logprobs_BT, samples.behavior_logprobs_BT, samples.mask_BT)
    _, mean_B1 = per_trajectory(log_ratio_BT.detach(), samples.mask_BT)
    own_BT = samples.masked(samples.current_logprobs_BT)
    ratio_BT = (mean_B1 + own_BT - own_BT.detach()).exp()
    surrogate_BT, is_clipped_BT = _clipped_surrogate(ratio_BT, samples, clip_ratio, clip_ratio_high, math.inf)
    return _token_losses(samples, -surrogate_BT, clip_fraction=is_clipped_BT)


def cispo_loss(
    samples: Samples,
    *,
    min_weight: Annotated[float, Setting("smaller ratios are taken for this", at_least=0, at_most=1)] = 0.0,
    max_weight: MaxWeight = 5.0,
) -> TokenLosses:
    """REINFORCE weighted with clipped ratios to the behavior policy: CISPO, arXiv:2506.13585.

    No token loses its gradient. Upper bounds from 4 to 8 do alike in arXiv:2510.13786.
    """
    ratio_BT = samples.ratio_to(samples.behavior_logprobs_BT).detach()
    is_clipped_BT = (ratio_BT < min_weight) | (ratio_BT > max_weight)
    return _weighted_score(samples, ratio_BT.clamp(min_weight, max_weight), clip_fraction=is_clipped_BT)


def dppo_loss(
    samples: Samples,
    *,
    max_rise: Annotated[
        float, Setting("probability by which a rewarded token may already have risen", at_least=0)
    ] = 0.2,
    max_fall: Annotated[
        float, Setting("probability by which a punished token may already have fallen", at_least=0)
    ] = 0.2,
    max_weight: MaxWeight = 10.0,
) -> TokenLosses:
    """REINFORCE on tokens whose probability moved little since they were sampled: DPPO, arXiv:2602.04879.

    The binary form of the total variation: |pi - mu| of the sampled token. It holds likely tokens, whose ratio cannot
    move much, and lets unlikely ones go, whose ratio means little. Ratios are truncated at max_weight.
    """
    ratio_BT = samples.ratio_to(samples.behavior_logprobs_BT).detach()
    rise_BT = (
        samples.masked(samples.current_logprobs_BT).detach().exp() - samples.masked(samples.behavior_logprobs_BT).exp()
    )
    is_out_BT = torch.where(samples.advantages_BT > 0, rise_BT > max_rise, rise_BT < -max_fall)
    weights_BT = torch.where(is_out_BT, 0.0, ratio_BT.clamp(max=max_weight))
    return _weighted_score(samples, weights_BT, clip_fraction=is_out_BT)


def m2po_loss(
    samples: Samples,
    *,
    max_second_moment: Annotated[float, Setting("of the log-ratio, over the tokens that go on", more_than=0)] = 0.04,
) -> TokenLosses:
    """The policy gradient without the few tokens that moved furthest in the batch: M2PO, arXiv:2510.01161.

    Algorithm 1, over the whole global batch: of the tokens that moved with their advantage, those with the largest
    (log pi / mu)^2 are left out until its mean is at most max_second_moment. Equal ones are left out together.
    """
    assert samples.batch is not None
    bound = second_moment_bound(samples.batch, max_second_moment)
    log_ratio_BT = bounded_log_ratio(samples.current_logprobs_BT, samples.behavior_logprobs_BT, samples.mask_BT)
    moved_BT = log_ratio_BT.detach()
    is_out_BT = _went_with_advantage(moved_BT, samples.advantages_BT) & (moved_BT.square() >= bound)
    surrogate_BT = torch.where(is_out_BT, 0.0, log_ratio_BT.exp() * samples.masked(samples.advantages_BT))
    return _token_losses(samples, -surrogate_BT, clip_fraction=is_out_BT)


def second_moment_bound(batch: BatchRatios, max_second_moment: float) -> float:
    """The smallest (log pi / mu)^2 that is left out; inf when nothing is."""
    bounded_M = batch.log_ratios_M.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    squares_M = bounded_M[_went_with_advantage(bounded_M, batch.advantages_M)].square().sort().values
    counts_M = torch.arange(1, len(squares_M) + 1, device=squares_M.device)
    num_kept = int((squares_M.double().cumsum(0) / counts_M <= max_second_moment).sum())
    return float(squares_M[num_kept]) if num_kept < len(squares_M) else math.inf


def sapo_loss(
    samples: Samples,
    *,
    tau_positive: Annotated[float, Setting("steepness of the gate of a rewarded token", more_than=0)] = 1.0,
    tau_negative: Annotated[float, Setting("steepness of the gate of a punished token", more_than=0)] = 1.05,
) -> TokenLosses:
    """A sigmoid of the ratio to the behavior policy in place of a clip: SAPO, arXiv:2511.20347.

    4 / tau * sigmoid(tau (r - 1)): its slope is 1 at ratio 1, and fades on both sides.
    """
    advantages_BT = samples.masked(samples.advantages_BT)
    tau_BT = torch.full_like(advantages_BT, tau_negative).masked_fill(advantages_BT > 0, tau_positive)
    ratio_BT = samples.ratio_to(samples.behavior_logprobs_BT)
    gate_BT = (4.0 / tau_BT) * torch.sigmoid(tau_BT * (ratio_BT - 1.0))
    return _token_losses(samples, -gate_BT * advantages_BT)


def reinforce_loss(samples: Samples) -> TokenLosses:
    """The policy gradient, importance-weighted back to the behavior policy: Williams 1992.

    With weights pi_theta / mu as the corrections leave them, and no trust region of its own.
    """
    return _weighted_score(samples, samples.masked(samples.weights_BT).detach())


def entropy_losses(entropy_BT: Tensor, loss_mask_BT: Tensor, *, coefficient: float) -> Tensor:
    """[B, T]: minus the entropy of what could have been sampled in place of each token, to be added to the loss."""
    return -coefficient * torch.where(loss_mask_BT, entropy_BT, 0.0)


def _clipped_surrogate(
    ratio_BT: Tensor, samples: Samples, clip_ratio: float, clip_ratio_high: float, dual_clip: float
) -> tuple[Tensor, Tensor]:
    """(min(r A, clip(r) A), and not below dual_clip A where A < 0; where a clip took the gradient away)."""
    advantages_BT = samples.masked(samples.advantages_BT)
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip_ratio, 1 + clip_ratio_high) * advantages_BT
    surrogate_BT, is_clipped_BT = torch.minimum(unclipped_BT, clipped_BT), clipped_BT < unclipped_BT
    is_far_BT = (advantages_BT < 0) & (ratio_BT > dual_clip)
    if dual_clip < math.inf:  # inf * 0 would be nan
        surrogate_BT = torch.where(is_far_BT, dual_clip * advantages_BT, surrogate_BT)
    return surrogate_BT, is_clipped_BT | is_far_BT


def _weighted_score(samples: Samples, weights_BT: Tensor, **shares_BT: Tensor) -> TokenLosses:
    """-w A log pi: its gradient is the policy gradient with weights w, its value tells nothing."""
    score_BT = samples.masked(samples.current_logprobs_BT) * samples.masked(samples.advantages_BT)
    return _token_losses(samples, -weights_BT * score_BT, **shares_BT)


def _token_losses(samples: Samples, losses_BT: Tensor, **shares_BT: Tensor) -> TokenLosses:
    """shares_BT: bool; of the tokens in the mask, where something happened."""
    return TokenLosses(samples.masked(losses_BT), token_means(shares_BT, samples.mask_BT))


def _went_with_advantage(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Where a trust region holds: what is rewarded already is likelier, what is punished already less likely."""
    return ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))


def value_loss(
    values_BT: Tensor,  # of the critic being trained, carries grad
    old_values_BT: Tensor,  # of the critic before the step
    returns_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    value_clip: float = 0.5,
) -> TokenLosses:
    """Half the squared error, the larger of unclipped and clipped to old_values +- value_clip, as PPO's authors do."""
    values_BT, old_values_BT, returns_BT = (  # before any square: its slope at nan is nan, even times 0
        torch.where(loss_mask_BT, tensor_BT, 0.0) for tensor_BT in (values_BT, old_values_BT, returns_BT)
    )
    clipped_values_BT = old_values_BT + (values_BT - old_values_BT).clamp(-value_clip, value_clip)
    error_BT, clipped_error_BT = (values_BT - returns_BT).square(), (clipped_values_BT - returns_BT).square()
    told = {"value_error_squared": error_BT, "value_clip_fraction": clipped_error_BT > error_BT}
    return TokenLosses(0.5 * torch.maximum(error_BT, clipped_error_BT), token_means(told, loss_mask_BT))
