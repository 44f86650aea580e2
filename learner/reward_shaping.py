"""From the rewards that environments gave to those that advantages are made of, and what is left out of a step."""

from dataclasses import replace

import torch
from torch import Tensor

from learner.algorithms.advantages import equal_in_group
from learner.algorithms.moments import Moments
from learner.algorithms.rewards import clip_rewards, overlong_penalties, share_of_equal_groups
from learner.reward_settings import RewardSettings
from learner.training import TrainBatch


class RewardShaper:
    """Its state is what running normalisation has seen so far, and only with that has it one."""

    def __init__(self, settings: RewardSettings) -> None:
        self._settings = settings
        self._moments = self._moments_with_batch = Moments()

    def shape(self, batch: TrainBatch) -> tuple[TrainBatch, dict[str, float]]:
        """(the batch as it is trained, metrics); its rewards are forgotten again unless keep() follows."""
        settings = self._settings
        rewards_N, self._moments_with_batch = shape_rewards(batch, settings, self._moments)
        shaped = replace(batch, rewards_N=rewards_N)
        metrics = {
            "equal_reward_groups": share_of_equal_groups(rewards_N, batch.group_index_N),
            "length_mean": float(batch.lengths_N.float().mean()),
            "truncated": float((~batch.terminated_N).float().mean()),
        }
        if settings.changes_rewards:
            metrics["shaped_reward"] = float(rewards_N.mean())
        if settings.drops_trajectories:
            shaped = drop_trajectories(shaped, _dropped(shaped, settings))
            metrics["dropped_tokens"] = float((batch.loss_tokens_N - shaped.loss_tokens_N).sum())
            metrics["trained_tokens"] = float(shaped.loss_tokens_N.sum())
        return shaped, metrics

    def keep(self) -> None:
        """The step on the batch that was last shaped is taken."""
        self._moments = self._moments_with_batch

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; empty when the settings say it all."""
        if self._settings.normalization != "running":
            return {}
        moments = self._moments
        return {"reward_moments": torch.tensor([moments.count, moments.mean, moments.squares], dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint of a run that normalised so; one that did not leaves it without memories."""
        if self._settings.normalization == "running" and "reward_moments" in state:
            count, mean, squares = state["reward_moments"].tolist()
            self._moments = Moments(count=count, mean=mean, squares=squares)


def shape_rewards(batch: TrainBatch, settings: RewardSettings, moments: Moments) -> tuple[Tensor, Moments]:
    """(rewards_N, moments with those of the batch): penalty for length, normalisation, clipping."""
    rewards_N = batch.rewards_N
    if settings.overlong_length is not None:
        rewards_N = rewards_N + overlong_penalties(
            batch.lengths_N,
            max_length=settings.overlong_length,
            buffer=settings.overlong_buffer,
            penalty=settings.overlong_penalty,
        )
    if settings.normalization == "batch":
        rewards_N = Moments.of(rewards_N).normalize(rewards_N)
    elif settings.normalization == "running":
        moments = moments.merged(Moments.of(rewards_N))
        rewards_N = moments.normalize(rewards_N)
    if settings.clip is not None:
        rewards_N = clip_rewards(rewards_N, limit=settings.clip)
    return rewards_N, moments


def drop_trajectories(batch: TrainBatch, dropped_N: Tensor) -> TrainBatch:
    """Without gradient and uncounted among the loss tokens, although their rewards still count in their groups.

    Should nothing be left, the step is one without a gradient: the run goes on, and the loss is not 0 / 0.
    """
    micro_batches = [
        replace(micro, loss_mask_BT=micro.loss_mask_BT & ~dropped_N[micro.trajectory_index_B].unsqueeze(1))
        for micro in batch.micro_batches
    ]
    loss_tokens_N = torch.where(dropped_N, 0, batch.loss_tokens_N)
    num_loss_tokens = max(int(loss_tokens_N.sum()), 1)
    return replace(batch, micro_batches=micro_batches, loss_tokens_N=loss_tokens_N, num_loss_tokens=num_loss_tokens)


def _dropped(batch: TrainBatch, settings: RewardSettings) -> Tensor:
    """[N] bool"""
    dropped_N = torch.zeros(len(batch.rewards_N), dtype=torch.bool)
    if settings.drop_equal_groups:
        dropped_N |= equal_in_group(batch.rewards_N, batch.group_index_N)
    if settings.drop_truncated:
        dropped_N |= ~batch.terminated_N
    return dropped_N
