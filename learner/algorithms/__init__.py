"""Losses, advantages and corrections: pure functions, tensors in, tensors and metrics out.

Adding one is a function and a line in its table. Its keyword-only arguments with defaults are its settings.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from learner.algorithms.advantages import generalized_advantages, group_relative_advantages
from learner.algorithms.losses import LossOutput, decoupled_ppo_loss, ppo_loss, value_loss

LOSSES: dict[str, Callable[..., LossOutput]] = {"ppo": ppo_loss, "decoupled_ppo": decoupled_ppo_loss}
ADVANTAGES: dict[str, Callable[..., Any]] = {"grpo": group_relative_advantages, "gae": generalized_advantages}

__all__ = ["ADVANTAGES", "LOSSES", "LossOutput", "build_advantages", "build_loss", "settings_of", "value_loss"]


def build_loss(name: str, settings: Mapping[str, float]) -> Callable[..., LossOutput]:
    """The loss `name` with its settings filled in; raises ValueError naming what is known."""
    return _build("loss", LOSSES, name, settings)


def build_advantages(name: str, settings: Mapping[str, float]) -> Callable[..., Any]:
    """The advantage estimator `name` with its settings filled in; raises ValueError naming what is known."""
    return _build("advantage", ADVANTAGES, name, settings)


def settings_of(function: Callable[..., Any]) -> dict[str, float]:
    """Keyword-only arguments with defaults: the hyperparameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def _build(
    kind: str, table: Mapping[str, Callable[..., Any]], name: str, settings: Mapping[str, float]
) -> Callable[..., Any]:
    if name not in table:
        raise ValueError(f"unknown {kind} {name}; known: {', '.join(sorted(table))}")
    known = settings_of(table[name])
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting}; it takes: {', '.join(known)}")
    return partial(table[name], **settings)
