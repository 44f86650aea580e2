"""What the loops run over: the tokens of a trajectory that are trained on, one after the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Token:
    current: float  # log pi_theta
    behavior: float  # log mu
    proximal: float = 0.0  # log pi_prox
    advantage: float = 0.0
    weight: float = 1.0
    staleness: int = 0
    entropy: float = 0.0
    frozen: float | None = None  # log pi_theta where it is not differentiated; None: current

    @property
    def stopped(self) -> float:
        """sg[log pi_theta]"""
        return self.current if self.frozen is None else self.frozen


Row = Sequence[Token]
Rows = Sequence[Row]


def ratio(numerator: float, denominator: float) -> float:
    """Beyond e^20 and e^-20 they are taken for these."""
    return math.exp(min(max(numerator - denominator, -20.0), 20.0))


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def nudged(rows: Rows, b: int, t: int, step: float) -> list[list[Token]]:
    """The same, with another current log-probability of one token; what is not differentiated stays."""
    frozen = [[replace(token, frozen=token.stopped) for token in row] for row in rows]
    frozen[b][t] = replace(frozen[b][t], current=frozen[b][t].current + step)
    return frozen
