"""Metrics of what is seen in parts: they merge over micro-batches and over ranks, and only then become numbers."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from learner.algorithms.moments import Moments


class Metric(Protocol):
    """What a part of a batch says. In whatever order parts are merged, the number is that of the whole."""

    def merged(self, other: Any) -> "Metric":
        """With what another part says of the same."""
        ...

    @property
    def value(self) -> float | None:
        """None where nothing was seen that it could be of."""
        ...


Metrics = Mapping[str, Metric]


@dataclass(frozen=True, slots=True)
class Sum:
    """What already was divided by a number of the whole batch, as losses are."""

    value: float

    def merged(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)


@dataclass(frozen=True, slots=True)
class Mean:
    total: float = 0.0
    count: float = 0.0

    def merged(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(frozen=True, slots=True)
class Largest:
    seen: float = -math.inf

    def merged(self, other: "Largest") -> "Largest":
        return Largest(max(self.seen, other.seen))

    @property
    def value(self) -> float | None:
        return self.seen if self.seen > -math.inf else None


@dataclass(frozen=True, slots=True)
class Smallest:
    seen: float = math.inf

    def merged(self, other: "Smallest") -> "Smallest":
        return Smallest(min(self.seen, other.seen))

    @property
    def value(self) -> float | None:
        return self.seen if self.seen < math.inf else None


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviation of the population."""

    moments: Moments

    def merged(self, other: "Spread") -> "Spread":
        return Spread(self.moments.merged(other.moments))

    @property
    def value(self) -> float | None:
        return self.moments.std if self.moments.count else None


@dataclass(frozen=True, slots=True)
class EffectiveShare:
    """Of n weighted samples, how many equally weighted ones are worth as much, over n: Kish 1965.

    (sum of w)^2 / (n * sum of w^2), which is 1 / (1 + variance / mean^2): 1 where all weights are equal, 1 / n where
    one is everything.
    """

    weights: Moments

    def merged(self, other: "EffectiveShare") -> "EffectiveShare":
        return EffectiveShare(self.weights.merged(other.weights))

    @property
    def value(self) -> float | None:
        squares = self.weights.squares + self.weights.count * self.weights.mean**2
        return self.weights.count * self.weights.mean**2 / squares if squares else None


@dataclass(frozen=True, slots=True)
class ExplainedVariance:
    """1 - variance of (return - value) / variance of return: 1 for a critic that knows, 0 for one that says a constant.

    Nothing where all returns are the same.
    """

    returns: Moments
    errors: Moments

    def merged(self, other: "ExplainedVariance") -> "ExplainedVariance":
        return ExplainedVariance(self.returns.merged(other.returns), self.errors.merged(other.errors))

    @property
    def value(self) -> float | None:
        return 1.0 - self.errors.squares / self.returns.squares if self.returns.squares else None


def token_means(values: Mapping[str, Tensor], mask_BT: Tensor) -> dict[str, Metric]:
    """The mean of each [B, T] tensor over the mask, outside which anything may stand.

    However many they are, the device is waited for once.
    """
    totals = [torch.where(mask_BT, value_BT.detach().double(), 0.0).sum() for value_BT in values.values()]
    *sums, count = torch.stack([*totals, mask_BT.sum().double()]).tolist()
    return {name: Mean(total, count) for name, total in zip(values, sums, strict=True)}


def merge(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """As if all parts had been seen together; a metric that only some parts have is that of those."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merged(metric) if name in merged else metric
    return merged


def report(metrics: Metrics) -> dict[str, float]:
    """The numbers; what nothing was seen of is left out."""
    return {name: metric.value for name, metric in metrics.items() if metric.value is not None}
