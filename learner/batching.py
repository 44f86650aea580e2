"""Batching: groups of trajectories -> micro-batches under a token budget, as many for each part, of like size."""

from collections.abc import Sequence

import numpy as np
import torch

from common.staleness import NOT_SAMPLED, token_staleness
from common.trajectory import FinishReason, Group, Trajectory
from learner.cutting import cut_into_micro_batches
from learner.shared_prompts import find_units
from learner.training import ALONE_AND_PADDED, BatchLayout, MicroBatch, TrainBatch


def build_batch(
    groups: Sequence[Group],
    *,
    version: int,
    max_staleness: int,
    micro_batch_tokens: int,
    layout: BatchLayout = ALONE_AND_PADDED,
) -> TrainBatch:
    """The batch for the step that updates `version`.

    Its micro-batches are those of part 0, 1, ... in turn, as many for each: ranks go through them in lockstep, so those
    of one turn are balanced. Where there are too few trajectories a part gets one without any token to train.

    micro_batch_tokens: of a rank, so that ranks which compute sequences together get as many times more.

    Here the bound on staleness is enforced for every token, whatever happened before: one that is older than
    max_staleness optimizer steps stays as context and gets no gradient.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    group_index = [index for index, group in enumerate(groups) for _ in group.trajectories]
    units = find_units([trajectory.token_ids for trajectory in trajectories]) if layout.shares_prompts else None
    cut = cut_into_micro_batches(list(map(len, trajectories)), micro_batch_tokens, layout, units)
    micro_batches = [
        _pad([trajectories[index] for index in indexes], indexes, version=version, max_staleness=max_staleness)
        if indexes
        else _nothing_to_train()
        for indexes in cut
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


def _nothing_to_train() -> MicroBatch:
    """One trajectory of two tokens, neither of which counts: for a rank that has to do as the others do."""
    shape = (1, 2)
    return MicroBatch(
        token_ids_BT=torch.zeros(shape, dtype=torch.int64),
        attention_mask_BT=torch.ones(shape, dtype=torch.bool),
        loss_mask_BT=torch.zeros(shape, dtype=torch.bool),
        behavior_logprobs_BT=torch.zeros(shape, dtype=torch.float32),
        staleness_BT=torch.zeros(shape, dtype=torch.int32),
        trajectory_index_B=torch.zeros(1, dtype=torch.int64),
    )
