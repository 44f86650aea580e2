"""Corrections: of each token, what it weighs and whether it is left in. The evidence is pi_prox against mu."""

import math
from dataclasses import dataclass
from statistics import fmean

from tests.oracles.tokens import Row, Token, ratio


@dataclass(frozen=True)
class Corrected:
    weight: float
    kept: bool = True


def rho(o: Token) -> float:
    return ratio(o.proximal, o.behavior)


def product(row: Row) -> float:
    """Of a whole trajectory; beyond e^20 and e^-20 it is taken for these."""
    return ratio(sum(math.log(rho(o)) for o in row), 0.0)


def geometric_mean(row: Row) -> float:
    return math.exp(fmean(math.log(rho(o)) for o in row))


def uncorrected(row: Row) -> list[Corrected]:
    return [Corrected(rho(o)) for o in row]


def truncate_tokens(row: Row, *, max_weight: float = 2.0) -> list[Corrected]:
    return [Corrected(min(rho(o), max_weight)) for o in row]


def truncate_sequences(row: Row, *, max_weight: float = 5.0) -> list[Corrected]:
    return [Corrected(min(product(row), max_weight)) for _ in row]


def taper(row: Row, *, max_weight: float = 1.0) -> list[Corrected]:
    """arXiv:2503.14286, for each token: 1 where A > 0, else rho up to a bound."""
    return [Corrected(1.0 if o.advantage > 0 else min(rho(o), max_weight)) for o in row]


def unweighted(row: Row) -> list[Corrected]:
    return [Corrected(1.0) for _ in row]


def icepop(row: Row, *, low: float = 0.5, high: float = 5.0) -> list[Corrected]:
    """arXiv:2510.18855: M(k) = k within [low, high], else 0."""
    return [Corrected(rho(o), low <= rho(o) <= high) for o in row]


def geometric_mask(row: Row, *, low: float = 0.99, high: float = 1.01) -> list[Corrected]:
    return [Corrected(rho(o), low <= geometric_mean(row) <= high) for o in row]


def product_mask(row: Row, *, low: float = 0.5, high: float = 2.0) -> list[Corrected]:
    return [Corrected(rho(o), low <= product(row) <= high) for o in row]


def veto(row: Row, *, min_ratio: float = 1e-4) -> list[Corrected]:
    return [Corrected(rho(o), all(rho(other) >= min_ratio for other in row)) for o in row]


def opsm(row: Row, *, max_kl: float = 1e-4) -> list[Corrected]:
    """arXiv:2512.02556: left out where A < 0 and the mean of log mu / pi is above the bound."""
    return [Corrected(rho(o), not (o.advantage < 0 and -math.log(geometric_mean(row)) > max_kl)) for o in row]


def interpolated(o: Token) -> float:
    """arXiv:2512.06547: log pi_prox between log mu, staleness steps back, and log pi, none back, at one step back."""
    if o.staleness == 0:
        return o.current
    return (1 / o.staleness) * o.behavior + (1 - 1 / o.staleness) * o.current
