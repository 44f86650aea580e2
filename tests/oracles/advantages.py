"""Advantages, KL and rewards as slow Python loops, one per summation sign. See tests/oracles.py.

An episode is the list of what its trained tokens got: `costs`, one number per token, and `reward`, given at the last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

Row = Sequence[float]
EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Episode:
    reward: float
    group: int
    costs: Row  # one per trained token
    values: Row = ()  # of the state before each of them
    after: float = 0.0  # value of the state after the last of them
    terminated: bool = True
    places: Sequence[int] = ()  # of the trained tokens in the whole text, where time passes over the others too

    @property
    def total(self) -> float:
        return self.reward + math.fsum(self.costs)

    def worth_after(self, bootstrap_truncated: bool) -> float:
        """Of the state after the last token."""
        return self.after if bootstrap_truncated and not self.terminated else 0.0

    def rewards(self, reward: float | None = None) -> list[float]:
        """Token by token."""
        rewards = list(self.costs)
        if rewards:
            rewards[-1] += self.reward if reward is None else reward
        return rewards


def peers(episode: Episode, episodes: Sequence[Episode]) -> list[Episode]:
    return [other for other in episodes if other.group == episode.group]


def group_mean(episode: Episode, episodes: Sequence[Episode]) -> float:
    return fmean(peer.total for peer in peers(episode, episodes))


def spread(episodes: Sequence[Episode], advantages: Row) -> list[list[float]]:
    """The same for every token of an episode."""
    return [[advantage] * len(episode.costs) for episode, advantage in zip(episodes, advantages, strict=True)]


def grpo(episodes: Sequence[Episode], *, normalize: bool = True) -> list[list[float]]:
    """arXiv:2402.03300, section 4.1.2."""
    advantages = []
    for episode in episodes:
        mean, group = group_mean(episode, episodes), peers(episode, episodes)
        squares = sum((peer.total - mean) ** 2 for peer in group)
        std = math.sqrt(squares / (len(group) - 1)) if len(group) > 1 else 0.0
        advantages.append((episode.total - mean) / (std + EPSILON if normalize else 1.0))
    return spread(episodes, advantages)


def dr_grpo(episodes: Sequence[Episode]) -> list[list[float]]:
    """arXiv:2503.20783."""
    return spread(episodes, [episode.total - group_mean(episode, episodes) for episode in episodes])


def rloo(episodes: Sequence[Episode]) -> list[list[float]]:
    """arXiv:2402.14740: the baseline is the mean of all the others."""
    advantages = []
    for episode in episodes:
        others = [peer.total for peer in peers(episode, episodes) if peer is not episode]
        advantages.append(episode.total - fmean(others) if others else 0.0)
    return spread(episodes, advantages)


def returns(rewards: Row, gamma: float) -> list[float]:
    """G_t, the sum over l of gamma^l r_{t+l}."""
    return [sum(gamma ** (j - t) * rewards[j] for j in range(t, len(rewards))) for t in range(len(rewards))]


def returns_in_time(rewards: Row, places: Sequence[int], gamma: float, gae_lambda: float = 1.0) -> list[float]:
    """As returns(), where gamma is for every token that lies between, and lambda for every trained one."""
    return [
        sum(gamma ** (places[j] - places[t]) * gae_lambda ** (j - t) * rewards[j] for j in range(t, len(rewards)))
        for t in range(len(rewards))
    ]


def gae_in_time(
    episodes: Sequence[Episode], *, gamma: float, gae_lambda: float, bootstrap_truncated: bool = False
) -> tuple[list[list[float]], list[list[float]]]:
    """As gae(), with time running over all tokens: the next state is as many tokens away as there are between."""
    advantages, targets = [], []
    for episode in episodes:
        rewards, last = episode.rewards(), len(episode.costs) - 1
        deltas = []
        for t, value in enumerate(episode.values):
            following = episode.values[t + 1] if t < last else episode.worth_after(bootstrap_truncated)
            steps = episode.places[t + 1] - episode.places[t] if t < last else 1
            deltas.append(rewards[t] + gamma**steps * following - value)
        row = returns_in_time(deltas, episode.places, gamma, gae_lambda)
        advantages.append(row)
        targets.append([advantage + value for advantage, value in zip(row, episode.values, strict=True)])
    return advantages, targets


def whitened(rows: Sequence[Row]) -> list[list[float]]:
    """Relative to the mean over all tokens of all rows, over their standard deviation."""
    everything = [value for row in rows for value in row]
    if not everything:
        return [[] for _ in rows]
    mean = fmean(everything)
    std = math.sqrt(fmean((value - mean) ** 2 for value in everything))
    return [[(value - mean) / (std + EPSILON) for value in row] for row in rows]


def reinforce(episodes: Sequence[Episode], *, gamma: float) -> list[list[float]]:
    return [returns(episode.rewards(), gamma) for episode in episodes]


def reinforce_plus_plus(episodes: Sequence[Episode], *, gamma: float) -> list[list[float]]:
    """arXiv:2501.03262."""
    return whitened(reinforce(episodes, gamma=gamma))


def reinforce_plus_plus_baseline(episodes: Sequence[Episode], *, gamma: float) -> list[list[float]]:
    """arXiv:2501.03262: the reward, and only it, relative to the mean of its group."""
    rows = []
    for episode in episodes:
        baseline = fmean(peer.reward for peer in peers(episode, episodes))
        rows.append(returns(episode.rewards(episode.reward - baseline), gamma))
    return whitened(rows)


def gae(
    episodes: Sequence[Episode], *, gamma: float, gae_lambda: float, bootstrap_truncated: bool = False
) -> tuple[list[list[float]], list[list[float]]]:
    """(advantages, returns): Schulman et al. 2015, equation 16, the sum over l of (gamma lambda)^l delta_{t+l}."""
    advantages, targets = [], []
    for episode in episodes:
        rewards, last = episode.rewards(), len(episode.costs) - 1
        deltas = []
        for t, value in enumerate(episode.values):
            following = episode.values[t + 1] if t < last else episode.worth_after(bootstrap_truncated)
            deltas.append(rewards[t] + gamma * following - value)
        row = returns(deltas, gamma * gae_lambda)
        advantages.append(row)
        targets.append([advantage + value for advantage, value in zip(row, episode.values, strict=True)])
    return advantages, targets


def kl(logprob: float, reference: float, estimator: str) -> float:
    """Schulman 2020, "Approximating KL divergence", at one token; r = reference / policy."""
    ratio = math.exp(reference) / math.exp(logprob)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": ratio - 1 - math.log(ratio)}[estimator]


def overlong(length: int, *, longest: int, buffer: int) -> float:
    """DAPO, equation 13."""
    if length <= longest - buffer:
        return 0.0
    if length <= longest:
        return ((longest - buffer) - length) / buffer
    return -1.0


def ziegler(coefficient: float, kls: Row, target: float) -> list[float]:
    """The coefficients after each step: arXiv:1909.08593, section 2.2."""
    coefficients = []
    for observed in kls:
        error = observed / target - 1
        if error > 0.2:
            error = 0.2
        elif error < -0.2:
            error = -0.2
        coefficient = coefficient * (1 + 0.1 * error)
        coefficients.append(coefficient)
    return coefficients
