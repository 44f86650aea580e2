"""What an evaluation says: mean reward and pass@k of one version over held-out tasks. Pure functions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from common.messages import EvaluatedEpisode
from learner.coordinator.messages import EvaluationReport

EVALUATION_METRICS: Mapping[str, str] = {
    "reward": "mean over tasks of the mean over their episodes, as environments gave it",
    "reward_error": "standard error of it over tasks",
    "pass_at_1": "chance that one episode gets evaluation_pass_reward; also pass_at_2, pass_at_4 and so on",
    "length_mean": "sampled tokens of an episode",
    "truncated": "share of the episodes that were cut off",
    "tasks": "that the others are over",
    "failed_tasks": "that could not be done, and are not among them",
}


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The chance that at least one of k episodes passes, estimated without bias from n episodes of which c passed.

    1 - C(n - c, k) / C(n, k): Chen et al. 2021 (arXiv:2107.03374), equation 1. Raises ValueError unless
    0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= num_passed <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"pass@{k} cannot be estimated from {num_passed} of {num_samples} episodes")
    return 1.0 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def powers_up_to(number: int) -> list[int]:
    """1, 2, 4, ... below `number`, and `number`."""
    return [*(1 << place for place in range(max(0, (number - 1).bit_length()))), number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One that is over. Without metrics when it was not completed: what is done first is not a fair sample."""

    asked_version: int
    version: int  # that sampled every token
    samples: int  # episodes of each task
    failed: Mapping[str, int]  # tasks, by kind
    unfinished: int  # tasks
    reason: str  # why any are unfinished
    metrics: Mapping[str, float]

    @property
    def is_complete(self) -> bool:
        return bool(self.metrics)

    def __str__(self) -> str:
        if not self.is_complete:
            reason = self.reason or f"every task failed: {dict(self.failed)}"
            return f"evaluation of version {self.asked_version} was given up: {reason}"
        return f"evaluation of {self.brief}"

    @property
    def brief(self) -> str:
        """Of a complete one, for people."""
        metrics, samples = self.metrics, self.samples
        failed = f", {metrics['failed_tasks']:.0f} failed" if metrics["failed_tasks"] else ""
        return (
            f"version {self.version}: mean reward {metrics['reward']:.3f}, pass@{samples} "
            f"{metrics[f'pass_at_{samples}']:.2f} ({metrics['tasks']:.0f} tasks{failed})"
        )


def evaluation_of(report: EvaluationReport, *, samples: int, pass_reward: float) -> Evaluation:
    """pass_reward: an episode with at least this reward counts as passed."""
    is_complete = not report.unfinished and bool(report.tasks)
    return Evaluation(
        asked_version=report.asked_version,
        version=report.version,
        samples=samples,
        failed=report.failed,
        unfinished=report.unfinished,
        reason=report.reason,
        metrics=_metrics(report, samples=samples, pass_reward=pass_reward) if is_complete else {},
    )


def _metrics(report: EvaluationReport, *, samples: int, pass_reward: float) -> dict[str, float]:
    groups: Sequence[Sequence[EvaluatedEpisode]] = [task.episodes for task in report.tasks]
    rewards = [fmean(episode.reward for episode in episodes) for episodes in groups]
    passed = [sum(episode.reward >= pass_reward for episode in episodes) for episodes in groups]
    episodes = [episode for group in groups for episode in group]
    return {
        "reward": fmean(rewards),
        "reward_error": stdev(rewards) / math.sqrt(len(rewards)) if len(rewards) > 1 else 0.0,
        **{f"pass_at_{k}": fmean(pass_at_k(samples, count, k) for count in passed) for k in powers_up_to(samples)},
        "length_mean": fmean(episode.num_tokens for episode in episodes),
        "truncated": fmean(not episode.terminated for episode in episodes),
        "tasks": float(len(groups)),
        "failed_tasks": float(sum(report.failed.values())),
    }
