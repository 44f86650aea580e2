"""The learning rate over the steps of a run."""

import math

from learner.training import TrainSettings


def learning_rate_scale(version: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate for the step that updates `version`: a warm-up, then the schedule."""
    if version < settings.warmup_steps:
        return (version + 1) / (settings.warmup_steps + 1)
    progress = (version - settings.warmup_steps) / max(settings.total_steps - settings.warmup_steps, 1)
    if settings.lr_schedule == "linear":
        return max(1.0 - progress, 0.0)
    if settings.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return 1.0
