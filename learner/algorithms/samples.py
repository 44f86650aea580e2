"""Samples: the tokens of a micro-batch, the policies' opinions of them, and what they are worth.

Shape suffixes: B = trajectories, T = tokens (padded), M = all tokens of the global batch that are trained on.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Ratios beyond e^20 are read as e^20: their exponential could be infinite, and what is infinite is never trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRatios:
    """Of the whole global batch, before the step: what a rule that compares all tokens with each other looks at."""

    log_ratios_M: Tensor  # log pi / mu
    advantages_M: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a policy loss sees. A row is one whole trajectory. Outside mask_BT anything may stand, -inf and nan too."""

    current_logprobs_BT: Tensor  # log pi_theta: being optimised, carries grad
    proximal_logprobs_BT: Tensor  # log pi_prox: centre of decoupled PPO's trust region
    behavior_logprobs_BT: Tensor  # log mu: the policy that sampled the tokens
    advantages_BT: Tensor
    weights_BT: Tensor  # pi_prox / mu, as corrected
    mask_BT: Tensor  # bool; sampled by the policy, young enough, and left in by the corrections
    batch: BatchRatios | None = None  # only where a loss asks for it

    def masked(self, tensor_BT: Tensor) -> Tensor:
        """0 outside the mask."""
        return torch.where(self.mask_BT, tensor_BT, 0.0)

    def ratio_to(self, logprobs_BT: Tensor) -> Tensor:
        """pi_theta over another policy, at most e^20 and at least e^-20; 1 outside the mask."""
        return bounded_log_ratio(self.current_logprobs_BT, logprobs_BT, self.mask_BT).exp()


def masked_log_ratio(numerator_BT: Tensor, denominator_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """log(p / q) per token; 0 outside the mask, where there may be -inf or nan."""
    return torch.where(loss_mask_BT, numerator_BT - denominator_BT, 0.0)


def bounded_log_ratio(numerator_BT: Tensor, denominator_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
    """log(p / q) per token, within plus and minus 20; 0 outside the mask."""
    return masked_log_ratio(numerator_BT, denominator_BT, loss_mask_BT).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def per_trajectory(values_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(sums, means) over the mask, both [B, 1]; 0 for a row without a token."""
    sums_B1 = torch.where(mask_BT, values_BT, 0.0).sum(dim=1, keepdim=True)
    return sums_B1, sums_B1 / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
