"""Targets: what each micro-batch is trained towards, made of rewards and of what the networks say before the step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learner.algorithms.advantages import Episodes, Estimate
from learner.algorithms.health import advantage_health, critic_health
from learner.algorithms.metrics import report
from learner.algorithms.vtrace import OffPolicyEpisodes
from learner.opinions import Opinions
from learner.ranks import Alone, Ranks
from learner.token_table import TokenTable
from learner.training import TrainBatch


@dataclass(frozen=True, slots=True)
class Targets:
    """What a micro-batch is trained towards."""

    advantages_BT: Tensor
    old_values_BT: Tensor | None = None
    returns_BT: Tensor | None = None
    reference_logprobs_BT: Tensor | None = None


def build_targets(
    batch: TrainBatch, opinions: Opinions, estimate: Callable[[Episodes], Estimate], ranks: Ranks | None = None
) -> tuple[list[Targets], dict[str, float]]:
    """(targets of each micro-batch, metrics): the same, but for rounding, however the batch is cut.

    Of several ranks each gives its part of the batch, and learns what its micro-batches are trained towards.
    """
    table = TokenTable(batch.micro_batches, batch.loss_tokens_N)
    episodes = _episodes(batch, opinions, table, ranks or Alone())
    estimated = estimate(episodes)
    advantages = table.scatter(estimated.advantages_NK)
    returns = table.scatter(estimated.returns_NK) if estimated.returns_NK is not None else None
    targets = [
        Targets(
            advantages_BT=advantages[index],
            old_values_BT=opinions.values_BS[index][:, :-1] if opinions.values_BS is not None else None,
            returns_BT=returns[index] if returns is not None else None,
            reference_logprobs_BT=(
                opinions.reference_logprobs_BT[index] if opinions.reference_logprobs_BT is not None else None
            ),
        )
        for index in range(len(batch.micro_batches))
    ]
    return targets, _metrics(episodes, estimated)


def _episodes(batch: TrainBatch, opinions: Opinions, table: TokenTable, ranks: Ranks) -> Episodes:
    costs = opinions.token_rewards_BT
    values = opinions.values_BS
    own = opinions.logprobs_BT
    return OffPolicyEpisodes(
        rewards_N=batch.rewards_N,
        group_index_N=batch.group_index_N,
        mask_NK=table.mask_NK,
        token_rewards_NK=ranks.sum(table.gather(costs)) if costs is not None else torch.zeros(table.mask_NK.shape),
        values_NK=ranks.sum(table.gather([each_BS[:, :-1] for each_BS in values])) if values is not None else None,
        bootstrap_N=(
            torch.where(batch.terminated_N, 0.0, ranks.sum(table.gather_after_last(values)))
            if values is not None
            else None
        ),
        gaps_NK=_gaps(batch, table, ranks),
        log_ratios_NK=ranks.sum(table.gather(log_ratios(batch, own))) if own is not None else None,
    )


def _gaps(batch: TrainBatch, table: TokenTable, ranks: Ranks) -> Tensor:
    """[N, K]: tokens between a trained one and the next; 0 after the last."""
    shapes = [micro.loss_mask_BT.shape for micro in batch.micro_batches]
    places_NK = ranks.sum(table.gather([torch.arange(length).expand(rows, length) for rows, length in shapes]))
    has_next_NK = torch.nn.functional.pad(table.mask_NK[:, 1:], (0, 1))
    return torch.where(has_next_NK, places_NK.roll(-1, dims=1) - places_NK - 1, 0.0)


def log_ratios(batch: TrainBatch, logprobs_BT: Sequence[Tensor]) -> list[Tensor]:
    """log pi / mu of each micro-batch; outside the loss mask anything may stand."""
    return [own - micro.behavior_logprobs_BT for own, micro in zip(logprobs_BT, batch.micro_batches, strict=True)]


def _metrics(episodes: Episodes, estimated: Estimate) -> dict[str, float]:
    mask_NK = episodes.mask_NK
    metrics = advantage_health(estimated.advantages_NK[mask_NK])
    if estimated.returns_NK is not None and episodes.values_NK is not None:
        metrics |= critic_health(estimated.returns_NK[mask_NK], episodes.values_NK[mask_NK])
    return report(metrics)
