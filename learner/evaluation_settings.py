"""EvaluationSettings: what is evaluated while a run trains, and how often."""

import math
from dataclasses import dataclass

from common.messages import MAX_EVALUATION_TASKS, MAX_GROUP_SIZE

MAX_EPISODES = 1 << 20  # of an evaluation: its report is one message


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Raises ValueError for what is impossible."""

    every_steps: int
    data: str  # where the tasks are; empty: they are taken out of what is trained
    tasks: int
    samples: int  # episodes of each task
    temperature: float  # 0: greedy
    pass_reward: float  # an episode with at least this reward counts as passed
    hold_s: float  # for so long at most a server may stay at the version once a newer one is published
    timeout_s: float  # then an evaluation is given up

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"evaluate_every_steps must be >= 0, got {self.every_steps}; 0 means never")
        if not 1 <= self.tasks <= MAX_EVALUATION_TASKS:
            raise ValueError(f"evaluation_tasks must be from 1 to {MAX_EVALUATION_TASKS}, got {self.tasks}")
        if not 1 <= self.samples <= MAX_GROUP_SIZE:
            raise ValueError(f"evaluation_samples must be from 1 to {MAX_GROUP_SIZE}, got {self.samples}")
        self._check_sampling()
        if not 0 <= self.hold_s < math.inf:
            raise ValueError(f"evaluation_hold_s must be finite and >= 0, got {self.hold_s}")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"evaluation_timeout_s must be finite and > 0, got {self.timeout_s}")

    def _check_sampling(self) -> None:
        if self.tasks * self.samples > MAX_EPISODES:
            raise ValueError(
                f"evaluation_tasks times evaluation_samples must be at most {MAX_EPISODES}, got "
                f"{self.tasks * self.samples}"
            )
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"evaluation_temperature must be from 0 to 100, got {self.temperature}")
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"evaluation_samples {self.samples} at evaluation_temperature 0 gives episodes that are the same; "
                "it must be 1, or the temperature above 0"
            )
        if not math.isfinite(self.pass_reward):
            raise ValueError(f"evaluation_pass_reward must be finite, got {self.pass_reward}")
