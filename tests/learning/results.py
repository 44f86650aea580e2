"""Table and picture of a campaign."""

import csv
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from tests.learning.campaign import ARMS, STALENESS, Run

LAST_EVALUATIONS = 5  # the end of a run: a mean over so many

Results = Mapping[Run, Mapping[str, Any]]


def rewards(result: Mapping[str, Any]) -> list[float]:
    return [evaluation["reward"] for evaluation in result["evaluations"]]


def final_reward(result: Mapping[str, Any]) -> float:
    return statistics.fmean(rewards(result)[-LAST_EVALUATIONS:])


def steps_to(result: Mapping[str, Any], goal: float) -> float:
    """Optimizer steps until the reward of held-out prompts is first at the goal; infinite if it never is."""
    return next((each["version"] for each in result["evaluations"] if each["reward"] >= goal), float("inf"))


def cells(results: Results) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """The results of each setting, by seed."""
    by_cell: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for run in sorted(results, key=lambda run: run.seed):
        by_cell.setdefault((run.arm, run.max_staleness), []).append(results[run])
    return by_cell


def table(results: Results) -> str:
    by_cell = cells(results)
    lines = [
        "| staleness | | seeds | mean age | last reward | of that at 0 | worst seed | greedy right | steps to 0.9 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    base = statistics.fmean(final_reward(result) for result in by_cell.get(("corrected", 0), [])) if by_cell else 0.0
    for max_staleness in STALENESS:
        for arm in ARMS:
            if cell := by_cell.get((arm, max_staleness)):
                lines.append(_row(arm if max_staleness else "", max_staleness, cell, base))
    return "\n".join(lines)


def _row(arm: str, max_staleness: int, cell: list[Mapping[str, Any]], base: float) -> str:
    finals = [final_reward(result) for result in cell]
    mean = statistics.fmean(finals)
    age = statistics.fmean(step["staleness_mean"] for result in cell for step in result["steps"][max_staleness:])
    right = statistics.fmean(result["evaluations"][-1]["accuracy"] for result in cell)
    steps = statistics.median(steps_to(result, 0.9) for result in cell)
    return (
        f"| {max_staleness} | {arm} | {len(cell)} | {age:.2f} | {mean:.3f} ± {np.std(finals):.3f} | "
        f"{mean / base:.3f} | {min(finals):.3f} | {right:.1%} | {steps:.0f} |"
    )


def write_csv(results: Results, path: Path) -> None:
    """What the picture is drawn of, a line for each evaluation."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "max_staleness", "seed", "step", "reward", "accuracy"])
        for run, result in sorted(results.items(), key=lambda item: (item[0].seed, item[0].max_staleness, item[0].arm)):
            for each in result["evaluations"]:
                values = (each["version"], f"{each['reward']:.4f}", f"{each['accuracy']:.4f}")
                writer.writerow([run.arm, run.max_staleness, run.seed, *values])


def draw(results: Results, path: Path) -> None:
    """Reward of held-out prompts over optimizer steps: a panel for each arm, mean and range over the seeds."""
    figure, axes = plt.subplots(1, len(ARMS), figsize=(12, 4.6), sharey=True, layout="constrained")
    colors = plt.get_cmap("viridis_r")(np.linspace(0.1, 0.95, len(STALENESS)))
    by_cell = cells(results)
    for axis, arm in zip(axes, ARMS, strict=True):
        for max_staleness, color in zip(STALENESS, colors, strict=True):
            cell = by_cell.get((arm if max_staleness else "corrected", max_staleness))
            if not cell:
                continue
            length = min(len(result["evaluations"]) for result in cell)
            curves = np.array([rewards(result)[:length] for result in cell])
            steps = [evaluation["version"] for evaluation in cell[0]["evaluations"][:length]]
            axis.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.15, linewidth=0)
            axis.plot(steps, curves.mean(axis=0), color=color, label=f"staleness {max_staleness}")
        axis.set_title(arm, loc="left")
        axis.set_xlabel("optimizer step")
        axis.grid(color="#e8e8e8")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("reward of held-out prompts")
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
