"""Picture of how the coordinator scales."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from tests.simulation.scaling_run import Outcome

MARKERS = "os^"


def draw(series: Mapping[str, Sequence[Outcome]], path: Path) -> None:
    """Learner idle, staleness, waste and cost over the number of servers, a line for each of `series`, as a PNG."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.9), layout="constrained")
    for (name, found), marker in zip(series.items(), MARKERS, strict=False):
        servers = [outcome.scenario.servers for outcome in found]
        lines = (
            [100 * outcome.learner_idle for outcome in found],
            [outcome.staleness for outcome in found],
            [100 * outcome.never_trained for outcome in found],
            [1e6 * outcome.cpu_s_per_group for outcome in found],
        )
        for axis, values in zip(axes, lines, strict=True):
            axis.plot(servers, values, marker=marker, label=name)
    titles = (
        "learner idle, % of the time",
        "mean staleness of trained tokens, versions",
        "sampled and never trained, % of tokens",
        "CPU of the rules a group, us",
    )
    bound = max(outcome.scenario.max_staleness for found in series.values() for outcome in found)
    axes[1].axhline(bound, color="gray", linestyle="--", label="max_staleness")
    axes[2].axhline(5, color="gray", linestyle="--", label="at most 5 %")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xscale="log", xlabel="rollout servers")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[1].set_ylim(0, bound * 1.1)
    axes[1].legend(loc="lower right")
    axes[2].legend(loc="upper right")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
