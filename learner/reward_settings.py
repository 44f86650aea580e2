"""RewardSettings, KlSettings: what is done to a reward before it is learned from, and what is impossible."""

import math
from dataclasses import dataclass
from typing import Literal

GROUP_RELATIVE = ("dr_grpo", "grpo", "reinforce_plus_plus_baseline", "rloo")
"""The advantages that compare the trajectories of a group with each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """In this order: the penalty for length, normalisation, clipping; then what is left out."""

    overlong_buffer: int = 0  # tokens; 0: no penalty for length
    overlong_length: int | None = None  # sampled tokens at which the penalty is complete
    overlong_penalty: float = 1.0
    normalization: Literal["none", "batch", "running"] = "none"
    clip: float | None = None
    drop_equal_groups: bool = False
    drop_truncated: bool = False

    def __post_init__(self) -> None:
        if self.overlong_buffer < 0:
            raise ValueError(f"overlong_buffer must be >= 0, got {self.overlong_buffer}; 0 punishes no length")
        if not 0 < self.overlong_penalty < math.inf:
            raise ValueError(f"overlong_penalty must be finite and > 0, got {self.overlong_penalty}")
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"reward_clip must be finite and > 0, got {self.clip}")
        if self.overlong_buffer == 0:
            if self.overlong_length is not None or self.overlong_penalty != 1.0:
                raise ValueError("overlong_length and overlong_penalty punish nothing while overlong_buffer is 0")
        elif self.overlong_length is None or self.overlong_buffer > self.overlong_length:
            raise ValueError(
                f"overlong_buffer must be at most overlong_length {self.overlong_length}, got {self.overlong_buffer}"
            )

    @property
    def changes_rewards(self) -> bool:
        return self.overlong_buffer > 0 or self.normalization != "none" or self.clip is not None

    @property
    def drops_trajectories(self) -> bool:
        return self.drop_equal_groups or self.drop_truncated

    def check_advantage(self, advantage: str) -> None:
        """Raises ValueError when these rewards and those advantages make no sense together."""
        if self.drop_equal_groups:
            check_group_relative("drop_equal_groups", advantage)


def check_group_relative(setting: str, advantage: str) -> None:
    """Raises ValueError when the setting leaves out groups that have something to teach."""
    if advantage not in GROUP_RELATIVE:
        raise ValueError(
            f"{setting}: with advantage {advantage} a group of equal rewards has a gradient; "
            f"it has none with {', '.join(GROUP_RELATIVE)}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KlSettings:
    """How the policy is held near a reference."""

    coefficient: float = 0.0  # at the start of the run, when there is a target
    place: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] | None = None  # None: k1 in the reward, k3 in the loss
    target: float | None = None  # nats per trajectory; None: the coefficient stays as it is
    reference_model: str | None = None  # Hugging Face name or directory; None: no reference
    reference_offload: bool = False  # between its passes the reference lies in host memory

    def __post_init__(self) -> None:
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"kl_coefficient must be finite and >= 0, got {self.coefficient}; 0 needs no reference")
        if self.target is not None and not 0 < self.target < math.inf:
            raise ValueError(f"kl_target must be finite and > 0 nats per trajectory, got {self.target}")
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl_estimator k1 in the loss has a gradient that does not depend on the reference; "
                "take k2 or k3, or --kl-in reward"
            )
        self._check_presence()

    def _check_presence(self) -> None:
        """What needs a coefficient or a reference has one."""
        if self.coefficient == 0 and self.target is not None:
            raise ValueError("kl_target multiplies kl_coefficient, which is 0 and would stay so; set where it starts")
        if self.coefficient == 0 and self.estimator is not None:
            raise ValueError(f"kl_estimator {self.estimator} estimates nothing while kl_coefficient is 0")
        if self.coefficient > 0 and self.reference_model is None:
            raise ValueError(f"kl_coefficient {self.coefficient} needs a reference_model")
        if self.reference_offload and self.reference_model is None:
            raise ValueError("reference_offload: there is no reference; set kl_coefficient or reference_model")

    @property
    def chosen_estimator(self) -> str:
        return self.estimator or ("k1" if self.place == "reward" else "k3")
