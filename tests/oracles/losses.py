"""Losses: what each token of each trajectory costs, and what share of the whole it has."""

import math
from collections.abc import Sequence
from statistics import fmean

from tests.oracles.tokens import Row, Rows, clip, ratio

Losses = list[list[float]]


def clipped_surrogate(r: float, advantage: float, low: float, high: float, dual: float = math.inf) -> float:
    surrogate = min(r * advantage, clip(r, 1 - low, 1 + high) * advantage)
    return max(surrogate, dual * advantage) if advantage < 0 and dual < math.inf else surrogate


def ppo(rows: Rows, *, low: float = 0.2, high: float = 0.2, dual: float = math.inf) -> Losses:
    """Schulman et al. 2017, equation 7; dual: Ye et al. 2019 (arXiv:1912.09729), equation 5."""
    return [
        [-clipped_surrogate(ratio(o.current, o.behavior), o.advantage, low, high, dual) for o in row] for row in rows
    ]


def decoupled_ppo(rows: Rows, *, low: float = 0.2, high: float = 0.28, dual: float = math.inf) -> Losses:
    """Hilton et al. 2021, equation 2."""
    return [
        [-o.weight * clipped_surrogate(ratio(o.current, o.proximal), o.advantage, low, high, dual) for o in row]
        for row in rows
    ]


def gspo(rows: Rows, *, low: float = 3e-4, high: float = 4e-4) -> Losses:
    """arXiv:2507.18071, the token form: s_t = sg[s] pi / sg[pi]."""
    losses = []
    for row in rows:
        s = math.exp(fmean(math.log(ratio(o.stopped, o.behavior)) for o in row)) if row else 1.0
        losses.append([-clipped_surrogate(s * math.exp(o.current - o.stopped), o.advantage, low, high) for o in row])
    return losses


def gspo_of_sequences(rows: Rows, *, low: float, high: float) -> list[float]:
    """arXiv:2507.18071, equation 5: one loss per trajectory, all of whose tokens have one advantage."""
    losses = []
    for row in rows:
        s = math.exp(sum(o.current - o.behavior for o in row) / len(row))
        losses.append(-clipped_surrogate(s, row[0].advantage, low, high))
    return losses


def cispo(rows: Rows, *, least: float = 0.0, most: float = 5.0) -> Losses:
    """arXiv:2506.13585: sg[clip(r)] A log pi."""
    return [[-clip(ratio(o.stopped, o.behavior), least, most) * o.advantage * o.current for o in row] for row in rows]


def dppo(rows: Rows, *, rise: float = 0.2, fall: float = 0.2, most: float = 10.0) -> Losses:
    """arXiv:2602.04879, binary total variation: sg[M min(r, C)] A log pi."""

    def loss(o) -> float:
        moved = math.exp(o.stopped) - math.exp(o.behavior)
        left_out = moved > rise if o.advantage > 0 else moved < -fall
        return 0.0 if left_out else -min(ratio(o.stopped, o.behavior), most) * o.advantage * o.current

    return [[loss(o) for o in row] for row in rows]


def m2po(rows: Rows, *, threshold: float = 0.04) -> Losses:
    """arXiv:2510.01161, algorithm 1: one token after the other, over the whole batch."""

    def second_moment(place: tuple[int, int]) -> float:
        o = rows[place[0]][place[1]]
        return math.log(ratio(o.stopped, o.behavior)) ** 2

    trusted = []
    for b, row in enumerate(rows):
        for t, o in enumerate(row):
            r = ratio(o.stopped, o.behavior)
            if (o.advantage > 0 and r > 1) or (o.advantage < 0 and r < 1):
                trusted.append((b, t))
    left_out = set()
    while trusted and fmean(second_moment(place) for place in trusted) > threshold:
        furthest = max(trusted, key=second_moment)
        left_out.add(furthest)
        trusted.remove(furthest)
    return [
        [0.0 if (b, t) in left_out else -ratio(o.current, o.behavior) * o.advantage for t, o in enumerate(row)]
        for b, row in enumerate(rows)
    ]


def sapo(rows: Rows, *, positive: float = 1.0, negative: float = 1.05) -> Losses:
    """arXiv:2511.20347: f(r) = 4 / tau sigmoid(tau (r - 1))."""

    def gate(r: float, tau: float) -> float:
        x = tau * (r - 1)
        return 4 / tau / (1 + math.exp(-x))

    return [
        [-gate(ratio(o.current, o.behavior), positive if o.advantage > 0 else negative) * o.advantage for o in row]
        for row in rows
    ]


def reinforce(rows: Rows) -> Losses:
    """Williams 1992, importance-weighted."""
    return [[-o.weight * o.advantage * o.current for o in row] for row in rows]


def clip_fraction(row: Row, *, low: float, high: float, behavior: bool) -> float:
    """Tokens of a trajectory that moved out of the clip range in the direction of their advantage."""
    count = 0
    for o in row:
        r = ratio(o.current, o.behavior if behavior else o.proximal)
        count += r > 1 + high if o.advantage > 0 else r < 1 - low
    return count


def value(value: float, old: float, target: float, *, clip_to: float) -> float:
    """Half the larger of two squared errors, as in the code published with PPO."""
    step = clip(value - old, -clip_to, clip_to)
    return 0.5 * max((value - target) ** 2, (old + step - target) ** 2)


def token_mean(losses: Sequence[Sequence[float]], *, tokens: int) -> float:
    total = 0.0
    for row in losses:
        for loss in row:
            total += loss
    return total / tokens


def sequence_mean(losses: Sequence[Sequence[float]], *, trajectories: int) -> float:
    total = 0.0
    for row in losses:
        if row:
            total += sum(row) / len(row)
    return total / trajectories


def constant_length(losses: Sequence[Sequence[float]], *, trajectories: int, longest: int) -> float:
    """arXiv:2503.20783: the same constant for every trajectory of every batch."""
    total = 0.0
    for row in losses:
        total += sum(row) / longest
    return total / trajectories
