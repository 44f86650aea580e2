"""The picture of a run: reward, staleness, and when generation and training were busy."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from common.events import Intervals, intersect, merge
from deploy.report import RunSummary, duration

GENERATION, TRAINING, UPDATE = "#0072b2", "#d55e00", "#009e73"  # told apart also by colour-blind eyes
INK, FAINT = "#222222", "#e8e8e8"
MAX_SMOOTH_STEPS = 15
ZOOM_STEPS = 12  # the lower timeline shows about so many optimizer steps
BINS = 150  # of the upper timeline
LANES = {"generation": 2.0, "training": 1.0, "weight updates": 0.0}
LANE_HEIGHT = 0.8

STYLE = {
    "font.size": 11, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 12, "axes.titlelocation": "left", "axes.titlepad": 8,
    "axes.edgecolor": "#888888", "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False,
}  # fmt: skip


def draw(run: RunSummary, path: Path) -> None:
    """Write the picture as PNG."""
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplot_mosaic(
            [["reward", "staleness"], ["whole", "whole"], ["zoom", "zoom"]],
            figsize=(13, 9.6), height_ratios=[2.5, 1, 1], layout="constrained",
        )  # fmt: skip
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.12)
        draw_reward(axes["reward"], run)
        draw_staleness(axes["staleness"], run)
        window = zoom_window(run)
        draw_whole_run(axes["whole"], run, window)
        draw_zoom(axes["zoom"], run, window)
        figure.savefig(path, dpi=120)
        plt.close(figure)


def draw_reward(axis: Any, run: RunSummary) -> None:
    steps = np.array([step["step"] for step in run.steps])
    rewards = np.array([step["reward"] for step in run.steps])
    axis.plot(steps, rewards, color=TRAINING, alpha=0.3, linewidth=1)
    axis.plot(steps, smooth(rewards), color=TRAINING, linewidth=2.2, label="in training", marker=_marker(steps))
    values = list(rewards)
    if run.evaluations:
        versions = [event["version"] for event in run.evaluations]
        accuracies = [event["accuracy"] for event in run.evaluations]
        values += accuracies
        axis.plot(
            versions, accuracies, "D", color=INK, markersize=7, clip_on=False, label="held-out prompts right, greedy"
        )
    if run.evaluated:
        versions = [event["version"] for event in run.evaluated]
        held_out = [event["reward"] for event in run.evaluated]
        values += held_out
        axis.plot(versions, held_out, "o-", color=GENERATION, markersize=5, clip_on=False, label="held-out tasks")
    if min(values) >= 0 and max(values) <= 1:
        axis.set_ylim(0, 1.05)
    first, last = run.edge_rewards()
    axis.set_title(f"reward: {first:.2f} in the first steps, {last:.2f} in the last")
    axis.set_xlabel("optimizer step")
    axis.grid(color=FAINT)
    axis.set_axisbelow(True)
    _legend_below(axis)


def _marker(steps: np.ndarray) -> str | None:
    """One step makes no line."""
    return "o" if len(steps) == 1 else None


def draw_staleness(axis: Any, run: RunSummary) -> None:
    axis.set_title("share of trained tokens by age, in optimizer steps")
    axis.set_xlabel("optimizer step")
    axis.set_ylim(0, 1)
    shares = run.staleness_shares()
    steps = [step["step"] for step in run.steps]
    axis.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    if not shares:
        return
    edges = np.ravel([(step - 0.5, step + 0.5) for step in steps])
    by_age = [smooth(np.array([_share_of(step["staleness_histogram"], age) for step in run.steps])) for age in shares]
    colors = plt.get_cmap("viridis_r")(np.linspace(0.1, 0.8, len(shares)))
    axis.stackplot(edges, [np.repeat(line, 2) for line in by_age], colors=colors, linewidth=0, labels=_ages(shares))
    _legend_below(axis)


def _legend_below(axis: Any) -> None:
    """Where it hides nothing."""
    axis.legend(
        loc="upper left", bbox_to_anchor=(0, -0.14), ncols=4, handlelength=1.2, columnspacing=1.6, borderaxespad=0.2
    )


def _ages(shares: dict[int, float]) -> list[str]:
    return [f"{age} old: {share:.0%}" for age, share in shares.items()]


def _share_of(histogram: dict[str, int], age: int) -> float:
    return histogram.get(str(age), 0) / max(sum(histogram.values()), 1)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a tenth of the values; shorter at the ends."""
    window = np.ones(min(MAX_SMOOTH_STEPS, len(values) // 10) | 1)
    total = np.convolve(values, window, mode="same")
    return np.asarray(total / np.convolve(np.ones(len(values)), window, mode="same"))


def zoom_window(run: RunSummary) -> tuple[float, float]:
    """Seconds on the run's clock: about ZOOM_STEPS steps in the middle of the run."""
    width_s = min(run.wall_s, run.wall_s / len(run.steps) * ZOOM_STEPS)
    return (run.wall_s - width_s) / 2, (run.wall_s + width_s) / 2


def draw_whole_run(axis: Any, run: RunSummary, window: tuple[float, float]) -> None:
    """Busy shares of short stretches: of bars there would be more than pixels."""
    edges = np.linspace(0.0, run.wall_s, BINS + 1)
    axis.axvspan(*window, color=FAINT, zorder=0)
    for name, intervals, color in _busy(run):
        base = LANES[name] - LANE_HEIGHT / 2
        axis.stairs(busy_shares(intervals, edges) * LANE_HEIGHT + base, edges, baseline=base, fill=True, color=color)
    _draw_updates(axis, run, linewidth=0.6)
    _lay_out_lanes(axis, 0.0, run.wall_s)
    overlap = f": both busy {run.overlap:.0%} of the time" if run.generation else ""
    axis.set_title(f"the whole run{overlap} (height: share of time busy; grey: the part below)")


def draw_zoom(axis: Any, run: RunSummary, window: tuple[float, float]) -> None:
    for name, intervals, color in _busy(run):
        bars = [(start, end - start) for start, end in intersect(intervals, [window])]
        axis.broken_barh(bars, (LANES[name] - LANE_HEIGHT / 2, LANE_HEIGHT), color=color, linewidth=0)
    _draw_updates(axis, run, linewidth=1.5)
    _lay_out_lanes(axis, *window)
    axis.set_title(f"{duration(window[1] - window[0])} of it")
    axis.set_xlabel("seconds of the run")


def _busy(run: RunSummary) -> list[tuple[str, Intervals, str]]:
    return [
        ("generation", run.on_clock(run.generation), GENERATION),
        ("training", run.on_clock(run.training), TRAINING),
    ]


def _draw_updates(axis: Any, run: RunSummary, *, linewidth: float) -> None:
    """Also those too short to be seen at this scale."""
    updates = run.on_clock(merge([(event["t"], event["t_end"]) for event in run.updates]))
    low, high = LANES["weight updates"] - LANE_HEIGHT / 2, LANES["weight updates"] + LANE_HEIGHT / 2
    axis.broken_barh([(start, end - start) for start, end in updates], (low, LANE_HEIGHT), color=UPDATE, linewidth=0)
    axis.vlines([start for start, _ in updates], low, high, color=UPDATE, linewidth=linewidth)


def busy_shares(intervals: Intervals, edges: np.ndarray) -> np.ndarray:
    """Share of each bin [edges[i], edges[i + 1]) that the intervals cover; they are disjoint and in order."""
    ends = np.array(intervals).reshape(-1, 2)
    busy_s = np.zeros(len(edges))
    if len(ends):
        covered_s = np.concatenate([[0.0], np.cumsum(ends[:, 1] - ends[:, 0])])
        index = np.searchsorted(ends[:, 0], edges, side="right")  # intervals begun by each edge
        to_come_s = np.maximum(ends[np.maximum(index - 1, 0), 1] - edges, 0.0)  # of the last one
        busy_s = covered_s[index] - np.where(index > 0, to_come_s, 0.0)
    return np.diff(busy_s) / np.diff(edges)


def _lay_out_lanes(axis: Any, start: float, end: float) -> None:
    axis.set_yticks(list(LANES.values()), list(LANES))
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(start, end)
    axis.set_ylim(-0.6, 2.5)
    axis.spines["left"].set_visible(False)
