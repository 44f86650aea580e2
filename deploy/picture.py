"""The picture of a run: reward, staleness, and when generation and training were busy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.events import Intervals, intersect
from deploy.report import RunSummary

GENERATION, TRAINING, UPDATE = "#0072b2", "#d55e00", "#009e73"  # told apart also by colour-blind eyes
SMOOTH_STEPS = 15
ZOOM_S = 6.0
LANES = {"generation": 2, "training": 1, "weight updates": 0}


def draw(run: RunSummary, path: Path) -> None:
    """Write the picture as PNG."""
    figure, axes = plt.subplot_mosaic(
        [["reward", "staleness"], ["whole", "whole"], ["zoom", "zoom"]],
        figsize=(13, 9), height_ratios=[2.6, 1, 1], layout="constrained",
    )  # fmt: skip
    _draw_reward(axes["reward"], run)
    _draw_staleness(axes["staleness"], run)
    _draw_lanes(axes["whole"], run, run.start, run.end)
    axes["whole"].set_title(f"the whole run: both busy {run.overlap:.0%} of the time", loc="left")
    middle = run.start + run.wall_s / 2
    half = min(ZOOM_S, run.wall_s) / 2
    _draw_lanes(axes["zoom"], run, middle - half, middle + half)
    axes["zoom"].set_title(f"{2 * half:.0f} seconds of it", loc="left")
    axes["zoom"].set_xlabel("seconds since the start")
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_reward(axis: Any, run: RunSummary) -> None:
    steps = np.array([step["step"] for step in run.steps])
    rewards = np.array([step["reward"] for step in run.steps])
    axis.plot(steps, rewards, color=TRAINING, alpha=0.25, linewidth=1)
    axis.plot(steps, _smooth(rewards), color=TRAINING, linewidth=2, label="reward in training")
    if run.evaluations:
        versions = [event["version"] for event in run.evaluations]
        accuracies = [event["accuracy"] for event in run.evaluations]
        axis.plot(versions, accuracies, "D", color="black", label="held-out prompts right, greedy")
    axis.set_ylim(0, 1.05)
    axis.set_xlabel("optimizer step")
    axis.set_title("reward", loc="left")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, loc="lower right")


def _draw_staleness(axis: Any, run: RunSummary) -> None:
    ages = sorted({int(age) for step in run.steps for age in step["staleness_histogram"]})
    steps = [step["step"] for step in run.steps]
    shares = [_smooth(np.array([_share_of(step["staleness_histogram"], age) for step in run.steps])) for age in ages]
    colors = plt.get_cmap("viridis")(np.linspace(0.85, 0.15, len(ages)))
    axis.stackplot(steps, shares, labels=[f"{age} steps old" for age in ages], colors=colors, linewidth=0)
    axis.set_ylim(0, 1)
    axis.set_xlim(steps[0], steps[-1] + 1e-9)
    axis.set_xlabel("optimizer step")
    axis.set_title("share of trained tokens by staleness", loc="left")
    axis.legend(loc="lower left", framealpha=0.9, fontsize="small")


def _share_of(histogram: dict[str, int], age: int) -> float:
    return histogram.get(str(age), 0) / sum(histogram.values())


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean; shorter at the ends."""
    window = np.ones(min(SMOOTH_STEPS, len(values)))
    total = np.convolve(values, window, mode="same")
    return np.asarray(total / np.convolve(np.ones(len(values)), window, mode="same"))


def _draw_lanes(axis: Any, run: RunSummary, start: float, end: float) -> None:
    updates = [(event["t"], event["t_end"]) for event in run.updates]
    lanes = [("generation", run.generation, GENERATION), ("training", run.training, TRAINING)]
    for name, intervals, color in [*lanes, ("weight updates", updates, UPDATE)]:
        axis.broken_barh(_bars(intervals, run.start, start, end), (LANES[name] - 0.4, 0.8), color=color, linewidth=0)
    axis.set_yticks(list(LANES.values()), list(LANES))
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(start - run.start, end - run.start)
    axis.set_ylim(-0.6, 2.6)
    axis.spines["left"].set_visible(False)


def _bars(intervals: Intervals, origin: float, start: float, end: float) -> list[tuple[float, float]]:
    """(left, width) in seconds since `origin`, of what lies within [start, end)."""
    return [(left - origin, right - left) for left, right in intersect(intervals, [(start, end)])]
