"""Policy and value losses: one pure function each. Shape suffixes: B = trajectories, T = tokens (padded).

Every loss is a sum over the loss tokens divided by num_loss_tokens, the count over the global batch, so that it depends
neither on how the batch is cut into micro-batches nor on how these are spread over ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Metrics = dict[str, float]
"""Sums over the loss tokens; divided by their global number they are means."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    loss: Tensor  # scalar, carries grad
    metrics: Metrics


def masked_log_ratio(numerator_BT: Tensor, denominator_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """log(p / q) per token; 0 outside the mask, where there may be -inf or nan."""
    return torch.where(loss_mask_BT, numerator_BT - denominator_BT, 0.0)


def decoupled_ppo_loss(
    current_logprobs_BT: Tensor,  # log pi_theta: being optimised, carries grad
    proximal_logprobs_BT: Tensor,  # log pi_prox: centre of the trust region
    behavior_logprobs_BT: Tensor,  # log mu: the policy that sampled the tokens
    advantages_BT: Tensor,
    loss_mask_BT: Tensor,  # bool; True where the policy sampled the token
    *,
    num_loss_tokens: int,  # over the global batch
    clip_ratio: float = 0.2,
    clip_ratio_high: float = 0.28,
    max_behavior_weight: float = 2.0,
) -> LossOutput:
    """PPO clipped around a recent policy, importance-weighted back to the behavior policy.

    Hilton et al. 2021 (arXiv:2110.00641), with the behavior weight pi_prox / mu truncated at max_behavior_weight, and
    the clip range [1 - clip_ratio, 1 + clip_ratio_high] of DAPO (arXiv:2503.14476). pi_prox == mu is plain PPO.
    """
    log_weight_BT = masked_log_ratio(proximal_logprobs_BT, behavior_logprobs_BT, loss_mask_BT).detach()
    weight_BT = log_weight_BT.exp()
    truncated_BT = weight_BT.clamp(max=max_behavior_weight)
    surrogate_BT, clipped_BT = _clipped_surrogate(
        masked_log_ratio(current_logprobs_BT, proximal_logprobs_BT, loss_mask_BT).exp(),
        advantages_BT,
        clip_ratio=clip_ratio,
        clip_ratio_high=clip_ratio_high,
    )
    loss = -torch.where(loss_mask_BT, truncated_BT * surrogate_BT, 0.0).sum() / num_loss_tokens
    return LossOutput(
        loss,
        {
            "clip_fraction": _masked_sum(clipped_BT, loss_mask_BT),
            "behavior_weight": _masked_sum(weight_BT, loss_mask_BT),
            "behavior_weight_squared": _masked_sum(weight_BT.square(), loss_mask_BT),
            "behavior_weight_truncated": _masked_sum(weight_BT > max_behavior_weight, loss_mask_BT),
            "staleness_kl": _masked_sum(weight_BT - 1 - log_weight_BT, loss_mask_BT),
        },
    )


def ppo_loss(
    current_logprobs_BT: Tensor,
    proximal_logprobs_BT: Tensor,
    behavior_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int,
    clip_ratio: float = 0.2,
    clip_ratio_high: float = 0.2,
) -> LossOutput:
    """PPO clipped around the behavior policy: Schulman et al. 2017 (arXiv:1707.06347), equation 7.

    Two policies: what sampled the tokens is also the centre of the trust region; pi_prox is not used.
    """
    surrogate_BT, clipped_BT = _clipped_surrogate(
        masked_log_ratio(current_logprobs_BT, behavior_logprobs_BT, loss_mask_BT).exp(),
        advantages_BT,
        clip_ratio=clip_ratio,
        clip_ratio_high=clip_ratio_high,
    )
    loss = -torch.where(loss_mask_BT, surrogate_BT, 0.0).sum() / num_loss_tokens
    return LossOutput(loss, {"clip_fraction": _masked_sum(clipped_BT, loss_mask_BT)})


def value_loss(
    values_BT: Tensor,  # of the critic being trained, carries grad
    old_values_BT: Tensor,  # of the critic before the step
    returns_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int,
    value_clip: float = 0.5,
) -> LossOutput:
    """Half the squared error, the larger of unclipped and clipped to old_values +- value_clip, as PPO's authors do."""
    values_BT, old_values_BT, returns_BT = (  # before any square: its slope at nan is nan, even times 0
        torch.where(loss_mask_BT, tensor_BT, 0.0) for tensor_BT in (values_BT, old_values_BT, returns_BT)
    )
    clipped_values_BT = old_values_BT + (values_BT - old_values_BT).clamp(-value_clip, value_clip)
    error_BT = torch.maximum((values_BT - returns_BT).square(), (clipped_values_BT - returns_BT).square())
    loss = 0.5 * error_BT.sum() / num_loss_tokens
    return LossOutput(loss, {"value_error_squared": _masked_sum((values_BT - returns_BT).square(), loss_mask_BT)})


def _clipped_surrogate(
    ratio_BT: Tensor, advantages_BT: Tensor, *, clip_ratio: float, clip_ratio_high: float
) -> tuple[Tensor, Tensor]:
    """min(r A, clip(r) A), and where the clip took the gradient away."""
    unclipped_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip_ratio, 1 + clip_ratio_high) * advantages_BT
    return torch.minimum(unclipped_BT, clipped_BT), clipped_BT < unclipped_BT


def _masked_sum(values_BT: Tensor, loss_mask_BT: Tensor) -> float:
    return float(torch.where(loss_mask_BT, values_BT.detach().float(), 0.0).sum())
