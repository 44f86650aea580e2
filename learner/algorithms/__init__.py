"""Losses, advantages and corrections: pure functions, tensors in, tensors and metrics out.

Adding one is a function and a line in its table. Its keyword-only arguments with defaults are its settings.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from learner.algorithms import advantages
from learner.algorithms.advantages import Estimate
from learner.algorithms.losses import LossOutput, decoupled_ppo_loss, ppo_loss, value_loss

LOSSES: dict[str, Callable[..., LossOutput]] = {"ppo": ppo_loss, "decoupled_ppo": decoupled_ppo_loss}
ADVANTAGES: dict[str, Callable[..., Estimate]] = {
    "dr_grpo": advantages.unbiased_group_advantages,
    "gae": advantages.generalized_advantages,
    "grpo": advantages.group_relative_advantages,
    "reinforce": advantages.return_advantages,
    "reinforce_plus_plus": advantages.global_advantages,
    "reinforce_plus_plus_baseline": advantages.group_baseline_advantages,
    "rloo": advantages.leave_one_out_advantages,
}
DISCOUNTS = ("gamma", "gae_lambda")

__all__ = ["ADVANTAGES", "LOSSES", "LossOutput", "build_advantages", "build_loss", "settings_of", "value_loss"]


def build_loss(name: str, settings: Mapping[str, float]) -> Callable[..., LossOutput]:
    """The loss `name` with its settings filled in; raises ValueError naming what is known."""
    return _build("loss", LOSSES, name, settings)


def build_advantages(name: str, settings: Mapping[str, float]) -> Callable[..., Estimate]:
    """The advantage estimator `name` with its settings filled in; raises ValueError naming what is known."""
    estimator = _build("advantage", ADVANTAGES, name, settings)
    for setting in DISCOUNTS:
        if not 0 <= settings.get(setting, 1.0) <= 1:
            raise ValueError(f"{setting} of {name} must be from 0 to 1, got {settings[setting]}")
    return estimator


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
            raise ValueError(f"{name} has no setting {setting}; it takes: {', '.join(known) or 'none'}")
    return partial(table[name], **settings)
