"""V-trace: a critic's targets and advantages from what another policy sampled. N, K as in advantages.py."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from learner.algorithms.advantages import (
    BootstrapTruncated,
    CountEnvironment,
    Episodes,
    Estimate,
    GaeLambda,
    Gamma,
    carried_back,
)
from learner.algorithms.samples import MAX_LOG_RATIO
from learner.algorithms.settings import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class OffPolicyEpisodes(Episodes):
    """Episodes, and how likely the policy before the step would have done the same."""

    log_ratios_NK: Tensor | None = None  # log pi / mu


def vtrace_advantages(
    episodes: OffPolicyEpisodes,
    *,
    gamma: Gamma = 1.0,
    gae_lambda: GaeLambda = 1.0,
    max_rho: Annotated[
        float, Setting("bound on a token's own ratio: which policy the critic values", more_than=0)
    ] = 1.0,
    max_c: Annotated[float, Setting("bound on the ratio with which later tokens count", more_than=0)] = 1.0,
    bootstrap_truncated: BootstrapTruncated = 0.0,
    count_environment: CountEnvironment = 0.0,
) -> Estimate:
    """V-trace, with a critic: IMPALA, arXiv:1802.01561, section 4.

    Returns are v_s; advantages are r_s + gamma v_{s+1} - V(x_s), without the factor rho_s of the policy gradient: that
    is the importance weight, which the loss has. After its last token a trajectory is worth 0; bootstrap_truncated as
    in generalized_advantages().
    """
    assert episodes.values_NK is not None
    assert episodes.log_ratios_NK is not None
    mask_NK = episodes.mask_NK
    is_last_NK = mask_NK & ~torch.nn.functional.pad(mask_NK[:, 1:], (0, 1))
    after_last_N1 = episodes.worth_after_last_N(bootstrap_truncated).unsqueeze(1)
    values_NK, token_rewards_NK, log_ratios_NK = (
        torch.where(mask_NK, tensor_NK, 0.0)
        for tensor_NK in (episodes.values_NK, episodes.token_rewards_NK, episodes.log_ratios_NK)
    )
    ratios_NK = log_ratios_NK.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    rewards_NK = token_rewards_NK + torch.where(is_last_NK, episodes.rewards_N.unsqueeze(1), 0.0)
    following_NK = torch.where(is_last_NK, after_last_N1, values_NK.roll(-1, dims=1))
    discounts_NK = episodes.discounts_NK(gamma, count_environment)
    deltas_NK = ratios_NK.clamp(max=max_rho) * (rewards_NK + discounts_NK * following_NK - values_NK)
    factors_NK = gae_lambda * discounts_NK * ratios_NK.clamp(max=max_c)
    gains_NK = carried_back(torch.where(mask_NK, deltas_NK, 0.0), factors_NK)
    targets_NK = torch.where(mask_NK, values_NK + gains_NK, 0.0)
    following_targets_NK = torch.where(is_last_NK, after_last_N1, targets_NK.roll(-1, dims=1))
    advantages_NK = torch.where(mask_NK, rewards_NK + discounts_NK * following_targets_NK - values_NK, 0.0)
    return Estimate(advantages_NK, targets_NK)
