"""Health of a batch, and V-trace, as loops."""

import math
from collections.abc import Sequence
from statistics import fmean, pstdev

from tests.oracles.tokens import Rows, ratio


def policy(rows: Rows) -> dict[str, float]:
    """Schulman 2020 for k1 and k3, Kish 1965 for the share."""
    every = [o for row in rows for o in row]
    numbers = {}
    for name, those in (
        ("mismatch", [o for o in every if o.staleness == 0]),
        ("staleness", [o for o in every if o.staleness > 0]),
    ):
        if those:
            numbers[f"{name}_k1"] = fmean(-math.log(ratio(o.current, o.behavior)) for o in those)
            numbers[f"{name}_k3"] = fmean(
                ratio(o.current, o.behavior) - 1 - math.log(ratio(o.current, o.behavior)) for o in those
            )
        if those and name == "mismatch":
            numbers["mismatch_abs"] = fmean(abs(math.log(ratio(o.current, o.behavior))) for o in those)
    if every:
        ratios = [ratio(o.current, o.behavior) for o in every]
        numbers |= {"ratio_mean": fmean(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        numbers["effective_sample_share"] = effective_share(ratios)
        numbers["entropy"] = fmean(o.entropy for o in every)
    return numbers


def effective_share(weights: Sequence[float]) -> float:
    total = squares = 0.0
    for weight in weights:
        total += weight
        squares += weight**2
    return total**2 / (len(weights) * squares)


def spread(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """mean, standard deviation, least, most"""
    return fmean(numbers), pstdev(numbers), min(numbers), max(numbers)


def explained_variance(returns: Sequence[float], values: Sequence[float]) -> float:
    errors = [target - value for target, value in zip(returns, values, strict=True)]
    return 1 - pstdev(errors) ** 2 / pstdev(returns) ** 2


def vtrace(
    log_ratios: Sequence[float], rewards: Sequence[float], values: Sequence[float], after: float,
    *, gamma: float, gae_lambda: float, max_rho: float, max_c: float,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """(advantages, v) of one trajectory: Espeholt et al. 2018, section 4.1, the sum over t and the product over i.

    v_s = V(x_s) + sum_t gamma^(t-s) (prod_{i=s}^{t-1} c_i) rho_t (r_t + gamma V(x_{t+1}) - V(x_t))
    """
    n = len(rewards)
    states = [*values, after]
    rho = [min(max_rho, ratio(log_ratio, 0.0)) for log_ratio in log_ratios]
    c = [gae_lambda * min(max_c, ratio(log_ratio, 0.0)) for log_ratio in log_ratios]
    targets = []
    for s in range(n):
        v = states[s]
        for t in range(s, n):
            delta = rho[t] * (rewards[t] + gamma * states[t + 1] - states[t])
            v += gamma ** (t - s) * math.prod(c[s:t]) * delta
        targets.append(v)
    following = [*targets[1:], after]
    advantages = [rewards[s] + gamma * following[s] - states[s] for s in range(n)]
    return advantages, targets
