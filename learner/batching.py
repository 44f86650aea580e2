"""Batching: groups of trajectories -> padded micro-batches under a token budget."""

from collections.abc import Sequence

import numpy as np
import torch

from common.staleness import NOT_SAMPLED, token_staleness
from common.trajectory import FinishReason, Group, Trajectory
from learner.training import MicroBatch, TrainBatch


def build_batch(groups: Sequence[Group], *, version: int, max_staleness: int, micro_batch_tokens: int) -> TrainBatch:
    """The batch for the step that updates `version`.

    Here the bound on staleness is enforced for every token, whatever happened before: one that is older than
    max_staleness optimizer steps stays as context and gets no gradient.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    group_index = [index for index, group in enumerate(groups) for _ in group.trajectories]
    # By length, so that little is padded; ties by place, so that the cut depends on nothing else.
    order = sorted(range(len(trajectories)), key=lambda index: (len(trajectories[index]), index))
    micro_batches = [
        _pad([trajectories[index] for index in indexes], indexes, version=version, max_staleness=max_staleness)
        for indexes in _cut(order, trajectories, micro_batch_tokens)
    ]
    loss_tokens_N = torch.zeros(len(trajectories), dtype=torch.int64)
    for micro_batch in micro_batches:
        loss_tokens_N[micro_batch.trajectory_index_B] = micro_batch.loss_mask_BT.sum(dim=1)
    over_stale = [_is_over_stale(trajectory, version, max_staleness) for trajectory in trajectories]
    return TrainBatch(
        micro_batches=micro_batches,
        rewards_N=torch.tensor([trajectory.reward for trajectory in trajectories], dtype=torch.float32),
        lengths_N=torch.tensor([int(trajectory.loss_mask.sum()) for trajectory in trajectories], dtype=torch.int64),
        terminated_N=torch.tensor([t.finish_reason is FinishReason.TERMINATED for t in trajectories]),
        group_index_N=torch.tensor(group_index, dtype=torch.int64),
        loss_tokens_N=loss_tokens_N,
        num_loss_tokens=int(loss_tokens_N.sum()),
        num_over_stale_tokens=sum(int(is_over_T.sum()) for is_over_T in over_stale),
    )


def _is_over_stale(trajectory: Trajectory, version: int, max_staleness: int) -> np.ndarray:
    """[T] bool: sampled, but too old to be trained on."""
    return trajectory.loss_mask & (token_staleness(trajectory.token_versions, current=version) > max_staleness)


def _cut(order: Sequence[int], trajectories: Sequence[Trajectory], micro_batch_tokens: int) -> list[list[int]]:
    """Consecutive runs of `order` whose padded size fits the budget; one that is too long goes alone."""
    runs: list[list[int]] = []
    for index in order:  # lengths only grow, so this one is the longest so far
        if runs and (len(runs[-1]) + 1) * len(trajectories[index]) <= micro_batch_tokens:
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _pad(trajectories: Sequence[Trajectory], indexes: Sequence[int], *, version: int, max_staleness: int) -> MicroBatch:
    def stack(name: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
        length = max(map(len, trajectories))
        padded = torch.full((len(trajectories), length), fill, dtype=dtype)
        for row, trajectory in enumerate(trajectories):
            padded[row, : len(trajectory)] = torch.from_numpy(np.array(getattr(trajectory, name)))
        return padded

    token_versions_BT = stack("token_versions", NOT_SAMPLED, torch.int32)
    staleness_BT = torch.from_numpy(token_staleness(token_versions_BT.numpy(), current=version))
    lengths_B = torch.tensor([len(trajectory) for trajectory in trajectories])
    loss_mask_BT = stack("loss_mask", False, torch.bool) & (staleness_BT <= max_staleness)
    loss_mask_BT[:, 0] = False  # nothing comes before the first token, so the policy gives it no probability
    return MicroBatch(
        token_ids_BT=stack("token_ids", 0, torch.int64),
        attention_mask_BT=torch.arange(token_versions_BT.shape[1]) < lengths_B[:, None],
        loss_mask_BT=loss_mask_BT,
        behavior_logprobs_BT=stack("behavior_logprobs", 0.0, torch.float32),
        staleness_BT=staleness_BT,
        trajectory_index_B=torch.tensor(indexes, dtype=torch.int64),
    )
