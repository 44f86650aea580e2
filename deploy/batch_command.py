"""`countercurrent batch`: what is in the file of a batch that broke a step."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.staleness import token_staleness
from common.trajectory import Group, Trajectory
from learner.refused_batches import RefusedBatch, read_refused_batch

COLUMNS = ("task", "lease", "reward", "end", "turns", "tokens", "sampled", "oldest", "least logprob")


def show_batch(path: Path, *, as_json: bool) -> None:
    """A line per trajectory; as_json: an object per line, with its tokens. Raises UserError for any other file."""
    batch = read_refused_batch(path)
    if as_json:
        for group, trajectory in _trajectories(batch):
            print(json.dumps(_whole(batch, group, trajectory)))
        return
    print(f"the step that would have updated version {batch.version} was not taken: {batch.reason}")
    for name, value in sorted(batch.metrics.items()):
        print(f"  {name:<28} {value:g}")
    print()
    print("  ".join(f"{name:>13}" for name in COLUMNS))
    for group, trajectory in _trajectories(batch):
        print("  ".join(f"{value:>13}" for value in _summary(batch, group, trajectory)))


def _trajectories(batch: RefusedBatch) -> Iterator[tuple[Group, Trajectory]]:
    return ((group, trajectory) for group in batch.groups for trajectory in group.trajectories)


def _summary(batch: RefusedBatch, group: Group, trajectory: Trajectory) -> list[str]:
    sampled = trajectory.loss_mask
    ages = token_staleness(trajectory.token_versions, current=batch.version)[sampled]
    return [
        str(group.task_id),
        str(group.lease_id),
        f"{trajectory.reward:g}",
        trajectory.finish_reason.name.lower(),
        str(trajectory.turns),
        str(len(trajectory)),
        str(trajectory.num_sampled_tokens),
        str(ages.max()) if ages.size else "-",
        f"{trajectory.behavior_logprobs[sampled].min():.3f}" if ages.size else "-",
    ]


def _whole(batch: RefusedBatch, group: Group, trajectory: Trajectory) -> dict[str, Any]:
    return {
        "version": batch.version,
        "task_id": group.task_id,
        "lease_id": group.lease_id,
        "reward": trajectory.reward,
        "finish_reason": trajectory.finish_reason.name.lower(),
        "turns": trajectory.turns,
        "token_ids": trajectory.token_ids.tolist(),
        "loss_mask": trajectory.loss_mask.astype(int).tolist(),
        "behavior_logprobs": trajectory.behavior_logprobs.tolist(),
        "token_versions": trajectory.token_versions.tolist(),
    }
