"""Settings that show whether ranks compute the same gradient, and what one rank on plain torch makes of them."""

from typing import Any

from torch import Tensor

from learner.torch_engine import open_torch_engine
from learner.training import StepResult, TrainSettings
from tests.builders_learner import some_train_settings, train, weights_of

SHARED = 2
"""Tokens that all trajectories of a group begin with, which ranks on DeepSpeed compute once."""


def settings_for(model: str, **overrides: Any) -> TrainSettings:
    """Adam's usual epsilon would make updates of a learning rate each out of the rounding errors of tiny gradients, and
    hide a gradient that is wrong by a factor."""
    values: dict[str, Any] = {"learning_rate": 1e-3, "critic_learning_rate": 1e-3, "adam_epsilon": 1e-3}
    return some_train_settings(model, **(values | overrides))


def one_rank(settings: TrainSettings, steps: int) -> tuple[dict[str, Tensor], list[StepResult]]:
    engine = open_torch_engine(settings)
    results = train(engine, steps=steps, shared=SHARED)
    return weights_of(engine, settings), results
