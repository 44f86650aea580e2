"""How far the policy is from a reference, and how strongly that is held against it. Pure functions.

Shape suffixes: B = trajectories, T = tokens (padded).
"""

import torch
from torch import Tensor

from learner.algorithms.losses import LossOutput, masked_log_ratio

MAX_LOG_RATIO = 20.0
"""Ratios beyond e^20 are read as e^20: their exponential would be infinite, and what is infinite is never trained."""


def kl_estimates(logprobs_BT: Tensor, reference_logprobs_BT: Tensor, loss_mask_BT: Tensor, *, estimator: str) -> Tensor:
    """KL(policy || reference) at each token the policy sampled, in nats; 0 outside the mask.

    With r = reference / policy, Schulman 2020 (joschu.net/blog/kl-approx.html): k1 = -log r has the right mean and is
    often negative; k2 = (log r)^2 / 2 is positive, and biased little where the two are close; k3 = r - 1 - log r has
    the right mean and is positive. Raises ValueError for another estimator.
    """
    log_ratio_BT = masked_log_ratio(reference_logprobs_BT, logprobs_BT, loss_mask_BT)
    log_ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_ratio_BT
    if estimator == "k2":
        return 0.5 * log_ratio_BT.square()
    if estimator == "k3":
        return torch.expm1(log_ratio_BT) - log_ratio_BT
    raise ValueError(f"unknown KL estimator {estimator}; known: k1, k2, k3")


def kl_loss(
    current_logprobs_BT: Tensor,  # carries grad
    reference_logprobs_BT: Tensor,
    loss_mask_BT: Tensor,
    *,
    num_loss_tokens: int,  # over the global batch
    coefficient: float,
    estimator: str,
) -> LossOutput:
    """coefficient times the mean of an estimate over the tokens, to be added to the policy's loss: arXiv:2402.03300.

    Where the policy sampled the tokens itself, the gradient of k2 is that of the KL; that of k3 is close to it where
    the policies are close. That of k1 knows nothing of the reference and is 0 on average: raises ValueError.
    """
    if estimator == "k1":
        raise ValueError("the gradient of k1 does not depend on the reference; in the loss take k2 or k3")
    estimates_BT = kl_estimates(current_logprobs_BT, reference_logprobs_BT, loss_mask_BT, estimator=estimator)
    loss = coefficient * estimates_BT.sum() / num_loss_tokens
    return LossOutput(loss, {"kl_loss": float(loss.detach()) * num_loss_tokens})


def kl_metrics(logprobs_BT: Tensor, reference_logprobs_BT: Tensor, loss_mask_BT: Tensor) -> dict[str, float]:
    """Sums over the tokens of k1 and k3, whatever is optimised."""
    return {
        f"reference_kl_{name}": float(
            kl_estimates(logprobs_BT, reference_logprobs_BT, loss_mask_BT, estimator=name).sum()
        )
        for name in ("k1", "k3")
    }


def adapted_coefficient(
    coefficient: float, kl: float, *, target: float, gain: float = 0.1, max_error: float = 0.2
) -> float:
    """The coefficient after a step that saw `kl`: more when that was over `target`, less when under.

    The log-space proportional controller of Ziegler et al. 2019 (arXiv:1909.08593), section 2.2. kl and target are in
    nats per trajectory. Its whole state is the coefficient.
    """
    error = min(max(kl / target - 1.0, -max_error), max_error)
    return coefficient * (1.0 + gain * error)
