"""PolicyObjective: loss, corrections, aggregation and entropy bonus, as one function of a micro-batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.algorithms import (
    WEIGHTED_LOSSES,
    WHOLE_BATCH_LOSSES,
    build_aggregation,
    build_corrections,
    build_loss,
    value_loss,
)
from learner.algorithms.aggregation import BatchCounts, aggregate, token_mean
from learner.algorithms.corrections import Evidence, apply_corrections
from learner.algorithms.health import policy_health, weight_health
from learner.algorithms.losses import entropy_losses
from learner.algorithms.metrics import Metric, Sum
from learner.algorithms.proximal import interpolated_logprobs
from learner.algorithms.samples import BatchRatios, Samples, bounded_log_ratio
from learner.ranks import Ranks, concatenated
from learner.targets import Targets, log_ratios
from learner.training import MicroBatch, TrainBatch, TrainSettings


class PolicyObjective:
    """What the policy is trained on. Chosen by the settings; raises ValueError for those that do not exist."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._loss = build_loss(settings.loss, settings.loss_settings)
        self._corrections = build_corrections(
            settings.corrections, loss=settings.loss, max_staleness=settings.max_staleness
        )
        self._shares = build_aggregation(settings.aggregation)

    def __repr__(self) -> str:
        corrections = ", ".join(self._corrections) or "nothing"
        return f"<PolicyObjective {self._settings.loss}, corrected by {corrections}, {self._settings.aggregation}>"

    @property
    def needs_batch_ratios(self) -> bool:
        """Whether the policy has to be asked about the whole batch before the step."""
        return self._settings.loss in WHOLE_BATCH_LOSSES

    def counts(self, batch: TrainBatch) -> BatchCounts:
        return BatchCounts(
            tokens=batch.num_loss_tokens,
            trajectories=max(int((batch.loss_tokens_N > 0).sum()), 1),
            max_new_tokens=self._settings.max_new_tokens,
        )

    def loss(
        self,
        logprobs_BT: Tensor,  # of the policy being trained, carries grad
        entropy_BT: Tensor,  # carries grad where there is a bonus
        micro: MicroBatch,  # on any device, like target
        target: Targets,
        counts: BatchCounts,
        batch_ratios: BatchRatios | None,
    ) -> tuple[Tensor, dict[str, Metric]]:
        """(the micro-batch's part in the loss of the batch, metrics)."""
        device = logprobs_BT.device
        loss_mask_BT, staleness_BT = micro.loss_mask_BT.to(device), micro.staleness_BT.to(device)
        behavior_BT, advantages_BT = micro.behavior_logprobs_BT.to(device), target.advantages_BT.to(device)
        proximal_BT = self._proximal(logprobs_BT, behavior_BT, staleness_BT)
        evidence = Evidence(
            log_ratio_BT=bounded_log_ratio(proximal_BT, behavior_BT, loss_mask_BT),
            advantages_BT=advantages_BT,
            mask_BT=loss_mask_BT,
        )
        correction = apply_corrections(self._corrections, evidence)
        samples = Samples(
            current_logprobs_BT=logprobs_BT,
            proximal_logprobs_BT=proximal_BT,
            behavior_logprobs_BT=behavior_BT,
            advantages_BT=advantages_BT,
            weights_BT=correction.weights_BT,
            mask_BT=correction.kept_BT,
            batch=batch_ratios,
        )
        token_losses = self._loss(samples)
        shares_BT = self._shares(loss_mask_BT, counts)
        loss = aggregate(token_losses.losses_BT, shares_BT)
        metrics = policy_health(logprobs_BT, behavior_BT, entropy_BT, staleness_BT, loss_mask_BT)
        metrics |= {**correction.metrics, **token_losses.metrics, "policy_loss": Sum(float(loss.detach()))}
        if self._settings.loss in WEIGHTED_LOSSES:
            metrics |= weight_health(correction.weights_BT, correction.kept_BT, loss_mask_BT)
        if coefficient := self._settings.entropy_coefficient:
            bonus = aggregate(entropy_losses(entropy_BT, loss_mask_BT, coefficient=coefficient), shares_BT)
            loss, metrics["entropy_loss"] = loss + bonus, Sum(float(bonus.detach()))
        return loss, metrics

    def _proximal(self, logprobs_BT: Tensor, behavior_BT: Tensor, staleness_BT: Tensor) -> Tensor:
        if self._settings.proximal == "interpolated":
            return interpolated_logprobs(logprobs_BT, behavior_BT, staleness_BT)
        # One optimizer step per batch: the parameters before it are the ones just used, so the proximal policy
        # needs no forward pass of its own.
        return logprobs_BT.detach()


def value_objective(
    values_BT: Tensor,  # of the critic being trained, carries grad
    micro: MicroBatch,  # on any device, like target
    target: Targets,
    counts: BatchCounts,
    *,
    value_clip: float,
) -> tuple[Tensor, dict[str, Metric]]:
    """(the micro-batch's part in the critic's loss of the batch, metrics)."""
    assert target.old_values_BT is not None
    assert target.returns_BT is not None
    device = values_BT.device
    loss_mask_BT = micro.loss_mask_BT.to(device)
    token_losses = value_loss(
        values_BT,
        target.old_values_BT.to(device),
        target.returns_BT.to(device),
        loss_mask_BT,
        value_clip=value_clip,
    )
    loss = aggregate(token_losses.losses_BT, token_mean(loss_mask_BT, counts))
    return loss, {**token_losses.metrics, "value_loss": Sum(float(loss.detach()))}


def batch_ratios(
    batch: TrainBatch, logprobs_BT: Sequence[Tensor], targets: Sequence[Targets], ranks: Ranks
) -> BatchRatios:
    """Of all tokens that are trained on; logprobs_BT: of the policy before the step, one tensor per micro-batch."""
    masks = [micro.loss_mask_BT for micro in batch.micro_batches]
    ratios = [ratio_BT[mask_BT] for ratio_BT, mask_BT in zip(log_ratios(batch, logprobs_BT), masks, strict=True)]
    advantages = [target.advantages_BT[mask_BT] for target, mask_BT in zip(targets, masks, strict=True)]
    return BatchRatios(
        log_ratios_M=concatenated(ranks, torch.cat(ratios)), advantages_M=concatenated(ranks, torch.cat(advantages))
    )
