"""Advantages: how much better than expected a trajectory, or a token, was. One pure function per estimator.

Every estimator sees the whole global batch, so that what it says depends neither on how the batch is cut into
micro-batches nor on how these are spread over ranks.

Shape suffixes: N = trajectories of the batch, K = trained tokens of a trajectory (padded).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from learner.algorithms.moments import Moments
from learner.algorithms.settings import Setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """What advantages are estimated from. Outside mask_NK anything may stand, -inf and nan included.

    Column k is a trajectory's k-th trained token: prompts, environment tokens and tokens too old to be trained are not
    among them, so time runs over what the policy did, and nothing is discounted across what it did not; but where a
    setting says so, gaps_NK are time as well.
    """

    rewards_N: Tensor  # of the whole trajectory, given at its last trained token
    group_index_N: Tensor  # int64; trajectories of one task share an index
    mask_NK: Tensor  # bool; True for the first tokens of a row, as many as it has
    token_rewards_NK: Tensor  # what single tokens got or cost beside it, such as -beta KL
    values_NK: Tensor | None = None  # with a critic: V of the state before each token
    gaps_NK: Tensor | None = None  # tokens between a trained one and the next trained one; 0 after the last
    bootstrap_N: Tensor | None = None  # with a critic: V of the state after the last token; 0 where the episode ended

    def worth_after_last_N(self, bootstrap_truncated: float) -> Tensor:
        """[N]: of the state after the last token; only a truncated one can be worth something."""
        assert self.bootstrap_N is not None
        return self.bootstrap_N if bootstrap_truncated else torch.zeros_like(self.bootstrap_N)

    @property
    def totals_N(self) -> Tensor:
        """Undiscounted reward of each trajectory, what its tokens cost included."""
        return self.rewards_N + torch.where(self.mask_NK, self.token_rewards_NK, 0.0).sum(dim=1)

    def discounts_NK(self, gamma: float, count_environment: float) -> Tensor:
        """[N, K]: what a trained token makes of what comes after it. count_environment: other tokens are time, too."""
        if not count_environment:
            return torch.full(self.mask_NK.shape, gamma, dtype=self.rewards_N.dtype)
        assert self.gaps_NK is not None
        steps_NK = 1.0 + torch.where(self.mask_NK, self.gaps_NK, 0.0)
        return torch.tensor(gamma, dtype=self.rewards_N.dtype) ** steps_NK


Gamma = Annotated[float, Setting("discount for each token of time", at_least=0, at_most=1)]
GaeLambda = Annotated[
    float, Setting("1: what really followed; 0: what the critic says of the next state", at_least=0, at_most=1)
]
CountEnvironment = Annotated[
    float, Setting("1: also tokens that are not trained, such as an environment's, are time", at_least=0, at_most=1)
]
BootstrapTruncated = Annotated[
    float,
    Setting(
        "1: what the critic says of the state where a trajectory was cut off is added to its reward",
        at_least=0,
        at_most=1,
    ),
]
Whiten = Annotated[float, Setting("1: mean 0 and deviation 1 over the batch's tokens", at_least=0, at_most=1)]


@dataclass(frozen=True, slots=True)
class Estimate:
    advantages_NK: Tensor  # 0 outside the mask
    returns_NK: Tensor | None = None  # what the critic is trained towards; 0 outside the mask


def group_relative_advantages(
    episodes: Episodes,
    *,
    normalize_std: Annotated[
        float, Setting("1: over the group's standard deviation; 0: not", at_least=0, at_most=1)
    ] = 1.0,
    epsilon: Annotated[float, Setting("added to that deviation", at_least=0)] = 1e-6,
) -> Estimate:
    """Reward minus the mean of its group, over the group's standard deviation: GRPO, arXiv:2402.03300, section 4.1.2.

    normalize_std 0 leaves the deviation out. A group of one, or of equal rewards, has advantage 0: it says nothing.
    """
    centered_N, count_N = _center_on_groups(episodes.totals_N, episodes.group_index_N)
    if not normalize_std:
        return _same_for_all_tokens(centered_N, episodes)
    std_N = (_group_sums(centered_N.square(), episodes.group_index_N) / (count_N - 1).clamp(min=1)).sqrt()
    return _same_for_all_tokens(centered_N / (std_N + epsilon), episodes)


def unbiased_group_advantages(episodes: Episodes) -> Estimate:
    """Reward minus the mean of its group: Dr. GRPO, arXiv:2503.20783.

    Not divided by the deviation, which favours tasks that are nearly solved or nearly hopeless. The paper's other half,
    a sum over tokens divided by a constant rather than by each trajectory's length, is the loss's aggregation.
    """
    centered_N, _ = _center_on_groups(episodes.totals_N, episodes.group_index_N)
    return _same_for_all_tokens(centered_N, episodes)


def leave_one_out_advantages(episodes: Episodes) -> Estimate:
    """Reward minus the mean of the others in its group: RLOO, arXiv:2402.14740. A group of one has 0."""
    centered_N, count_N = _center_on_groups(episodes.totals_N, episodes.group_index_N)
    # r - (S - r) / (n - 1) = n / (n - 1) (r - S / n)
    return _same_for_all_tokens(centered_N * count_N / (count_N - 1).clamp(min=1), episodes)


def return_advantages(
    episodes: Episodes, *, gamma: Gamma = 1.0, whiten: Whiten = 0.0, count_environment: CountEnvironment = 0.0
) -> Estimate:
    """The discounted return from each token on, without a baseline: REINFORCE, Williams 1992.

    whiten 1: with mean 0 and standard deviation 1 over the trained tokens of the batch.
    """
    discounts_NK = episodes.discounts_NK(gamma, count_environment)
    return _from_returns(episodes, episodes.rewards_N, discounts_NK, whiten=whiten)


def global_advantages(episodes: Episodes, *, gamma: Gamma = 1.0, count_environment: CountEnvironment = 0.0) -> Estimate:
    """The return from each token on, whitened over the tokens of the batch: REINFORCE++, arXiv:2501.03262.

    The paper takes its KL penalty token by token from the reward.
    """
    discounts_NK = episodes.discounts_NK(gamma, count_environment)
    return _from_returns(episodes, episodes.rewards_N, discounts_NK, whiten=1.0)


def group_baseline_advantages(
    episodes: Episodes, *, gamma: Gamma = 1.0, count_environment: CountEnvironment = 0.0
) -> Estimate:
    """As global_advantages, with rewards relative to the mean of their group: REINFORCE++-baseline, arXiv:2501.03262.

    A group of equal rewards is not quite silent: like all others it is seen relative to the mean over all tokens.
    """
    centered_N, _ = _center_on_groups(episodes.rewards_N, episodes.group_index_N)
    return _from_returns(episodes, centered_N, episodes.discounts_NK(gamma, count_environment), whiten=1.0)


def generalized_advantages(
    episodes: Episodes,
    *,
    gamma: Gamma = 1.0,
    gae_lambda: GaeLambda = 1.0,
    whiten: Whiten = 1.0,
    bootstrap_truncated: BootstrapTruncated = 0.0,
    count_environment: CountEnvironment = 0.0,
) -> Estimate:
    """GAE: Schulman et al. 2015 (arXiv:1506.02438), equation 16, with a critic.

    After its last token a trajectory is worth 0: its reward was for the whole of it. bootstrap_truncated 1: one that
    was cut off is worth what the critic says of the state it stopped in (Pardo et al. 2018, arXiv:1712.00378).
    whiten 1: advantages, not returns, get mean 0 and standard deviation 1 over the tokens of the batch.
    """
    assert episodes.values_NK is not None
    mask_NK = episodes.mask_NK
    values_NK = torch.where(mask_NK, episodes.values_NK, 0.0)
    after_last_N1 = episodes.worth_after_last_N(bootstrap_truncated).unsqueeze(1)
    following_NK = torch.where(_is_last(mask_NK), after_last_N1, values_NK.roll(-1, dims=1))
    rewards_NK = _token_rewards(episodes, episodes.rewards_N)
    discounts_NK = episodes.discounts_NK(gamma, count_environment)
    deltas_NK = torch.where(mask_NK, rewards_NK + discounts_NK * following_NK - values_NK, 0.0)
    advantages_NK = torch.where(mask_NK, carried_back(deltas_NK, gae_lambda * discounts_NK), 0.0)
    returns_NK = advantages_NK + values_NK
    return Estimate(_whiten(advantages_NK, mask_NK) if whiten else advantages_NK, returns_NK)


def _from_returns(episodes: Episodes, rewards_N: Tensor, discounts_NK: Tensor, *, whiten: float) -> Estimate:
    returns_NK = carried_back(_token_rewards(episodes, rewards_N), discounts_NK)
    advantages_NK = torch.where(episodes.mask_NK, returns_NK, 0.0)
    return Estimate(_whiten(advantages_NK, episodes.mask_NK) if whiten else advantages_NK)


def _same_for_all_tokens(advantages_N: Tensor, episodes: Episodes) -> Estimate:
    return Estimate(torch.where(episodes.mask_NK, advantages_N.unsqueeze(1), 0.0))


def _token_rewards(episodes: Episodes, rewards_N: Tensor) -> Tensor:
    """[N, K]: what each token got, the trajectory's reward at its last one; 0 outside the mask."""
    at_the_end_NK = torch.where(_is_last(episodes.mask_NK), rewards_N.unsqueeze(1), 0.0)
    return at_the_end_NK + torch.where(episodes.mask_NK, episodes.token_rewards_NK, 0.0)


def _is_last(mask_NK: Tensor) -> Tensor:
    return mask_NK & ~torch.nn.functional.pad(mask_NK[:, 1:], (0, 1))


def carried_back(values_NK: Tensor, factors_NK: Tensor) -> Tensor:
    """out[:, k] = values[:, k] + factors[:, k] out[:, k + 1]."""
    columns, factors = list(values_NK.unbind(dim=1)), factors_NK.unbind(dim=1)
    for k in reversed(range(len(columns) - 1)):
        columns[k] = columns[k] + factors[k] * columns[k + 1]
    return torch.stack(columns, dim=1) if columns else values_NK


def _whiten(values_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the mask."""
    return torch.where(mask_NK, Moments.of(values_NK[mask_NK]).normalize(values_NK), 0.0)


def _group_sums(values_N: Tensor, group_index_N: Tensor) -> Tensor:
    """[N]: of each trajectory, the sum over its group."""
    num_groups = int(group_index_N.max()) + 1
    sums_G = torch.zeros(num_groups, dtype=values_N.dtype).index_add_(0, group_index_N, values_N)
    return sums_G[group_index_N]


def _center_on_groups(values_N: Tensor, group_index_N: Tensor) -> tuple[Tensor, Tensor]:
    """(values minus the mean of their group, size of their group), both [N]; exactly 0 in a group of equals."""
    count_N = _group_sums(torch.ones_like(values_N), group_index_N)
    centered_N = values_N - _group_sums(values_N, group_index_N) / count_N
    # Equal values differ from their mean by a rounding error, which dividing by the deviation would blow up.
    return torch.where(equal_in_group(values_N, group_index_N), 0.0, centered_N), count_N


def equal_in_group(values_N: Tensor, group_index_N: Tensor) -> Tensor:
    """[N] bool: all values of its group are the same, as in a group of one."""
    num_groups = int(group_index_N.max()) + 1
    least_G, most_G = (
        torch.zeros(num_groups, dtype=values_N.dtype).scatter_reduce_(
            0, group_index_N, values_N, how, include_self=False
        )
        for how in ("amin", "amax")
    )
    return (most_G - least_G == 0)[group_index_N]  # not so of infinities, which are to be noticed
