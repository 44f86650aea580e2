"""What is impossible among the settings of losses. Light: the configuration is checked before torch is there."""

import math
from typing import Literal

Proximal = Literal["recomputed", "interpolated"]
"""Where the centre of decoupled PPO's trust region comes from: the policy before the step, or a guess at the one
before that, between it and the policy that sampled."""

OnNonfinite = Literal["stop", "skip"]
"""What is done about a batch whose loss or gradient is not finite."""

WITH_CRITIC = ("gae", "vtrace")
"""The advantages that need a critic."""

CriticKind = Literal["own", "value_head"]
"""A network of its own, or a head on the policy's trunk."""


MOMENTUM_STEPS = 10
"""Over how many steps momentum averages, which is 1 / (1 - beta1): 0.9 where no data is stale."""


def default_adam_beta1(max_staleness: int) -> float:
    """Such that momentum averages over MOMENTUM_STEPS / (max_staleness + 1) steps; none where that is less than one.

    Staleness K is momentum already, implicitly over K + 1 steps: Mitliagkas et al. 2016, arXiv:1605.09774.
    """
    return max(MOMENTUM_STEPS - 1 - max_staleness, 0) / MOMENTUM_STEPS


def check_proximal(proximal: Proximal, loss: str) -> None:
    """Raises ValueError when the loss has no use for it."""
    if proximal != "recomputed" and loss != "decoupled_ppo":
        raise ValueError(f"proximal {proximal} is a centre for the trust region of decoupled_ppo; loss {loss} has none")


def check_critic_warmup(critic_warmup_steps: int, advantage: str) -> None:
    """Raises ValueError for a negative number, or for steps in which nothing would be trained."""
    if critic_warmup_steps < 0:
        raise ValueError(f"critic_warmup_steps must be >= 0, got {critic_warmup_steps}")
    if critic_warmup_steps and advantage not in WITH_CRITIC:
        raise ValueError(
            f"critic_warmup_steps {critic_warmup_steps}: advantage {advantage} has no critic, nothing would be trained"
        )


def check_value_head(critic_model: str | None, critic_warmup_steps: int, advantage: str) -> None:
    """Of a policy with a value head. Raises ValueError for what it cannot have."""
    if advantage not in WITH_CRITIC:
        raise ValueError(f"critic value_head: advantage {advantage} has no critic; use {' or '.join(WITH_CRITIC)}")
    if critic_model is not None:
        raise ValueError(f"critic value_head stands on the policy's trunk: critic_model {critic_model} goes with own")
    if critic_warmup_steps:
        raise ValueError(
            f"critic_warmup_steps {critic_warmup_steps}: a value head shares the policy's trunk and cannot learn while "
            "that stays as it is; take --critic own"
        )


def check_strengths(entropy_coefficient: float, value_clip: float, value_coefficient: float) -> None:
    """Raises ValueError for what is no number that makes sense."""
    if not 0 <= entropy_coefficient < math.inf:
        raise ValueError(f"entropy_coefficient must be finite and >= 0, got {entropy_coefficient}; 0 is no bonus")
    if not value_clip > 0:
        raise ValueError(f"value_clip must be > 0, got {value_clip}; inf does not clip")
    if not 0 < value_coefficient < math.inf:
        raise ValueError(f"value_coefficient must be finite and > 0, got {value_coefficient}")
