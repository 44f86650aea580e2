"""PpoEngine: one optimizer step of PPO on a policy and, with GAE, a critic; the networks may be on any engine.

The critic is a network of its own, or a head of the policy's.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learner.algorithms import OFF_POLICY_ADVANTAGES, build_advantages
from learner.algorithms.aggregation import BatchCounts
from learner.algorithms.health import trajectory_health
from learner.algorithms.kl import kl_metrics
from learner.algorithms.metrics import Mean, Metric, Sum, merge, report
from learner.algorithms.samples import BatchRatios
from learner.engine_state import copy_state, export_huggingface, load_state
from learner.gradient_watch import GradientWatch
from learner.kl_control import KlControl
from learner.learning_rate import learning_rate_scale
from learner.metric_codec import merged_over
from learner.networks import CriticNetwork, PolicyNetwork
from learner.objective import PolicyObjective, batch_ratios, value_objective
from learner.opinions import Opinions, ask_networks
from learner.packing import FLASH
from learner.ranks import Alone, Ranks, concatenated
from learner.reference import Reference
from learner.reward_shaping import RewardShaper
from learner.targets import Targets, build_targets
from learner.trainable import Trainable
from learner.training import BatchLayout, MicroBatch, StepResult, TrainBatch, TrainSettings, WriteState


class PpoEngine:
    """A TrainEngine. `critic` is given when the advantages need one that is a network of its own.

    `reference` is given when the settings name one.
    """

    def __init__(
        self,
        settings: TrainSettings,
        policy: Trainable,
        critic: Trainable | None,
        reference: Reference | None = None,
        ranks: Ranks | None = None,
        parts: Ranks | None = None,
    ) -> None:
        """ranks: all that train together. parts: those with other parts of a batch than this one's; default: all.

        So ranks.size / parts.size ranks have the same part, and whatever they conclude from it is the same.
        """
        assert isinstance(policy.module, PolicyNetwork)
        assert critic is None or isinstance(critic.module, CriticNetwork)
        self._settings = settings
        self._policy = policy
        self._critic = critic
        self._reference = reference
        self._ranks = ranks or Alone()
        self._parts = parts or self._ranks
        self._shaper = RewardShaper(settings.rewards)
        self._kl = KlControl(settings.kl)
        self._network = policy.module
        self._objective = PolicyObjective(settings)
        self._advantages = build_advantages(settings.advantage, settings.advantage_settings)
        self._watches = [GradientWatch(network.module) for network in self._networks()]
        self._version = 0

    def __repr__(self) -> str:
        return f"<PpoEngine {self._settings.model} at version {self._version}, {self._objective!r}>"

    @property
    def version(self) -> int:
        return self._version

    @property
    def layout(self) -> BatchLayout:
        arrangement = self._network.arrangement
        one_row = self._network.model.config._attn_implementation == FLASH if arrangement.packs else False
        return BatchLayout(
            num_parts=self._parts.size,
            ranks_per_part=self._ranks.size // self._parts.size,
            ranks_per_sequence=arrangement.ranks.size if arrangement.ranks is not None else 1,
            packs=arrangement.packs,
            in_one_row=one_row,
            shares_prompts=arrangement.shares,
        )

    @property
    def _trains_policy(self) -> bool:
        """A critic that knows nothing yet is trained alone at first: advantages are noise until it does."""
        return self._version >= self._settings.critic_warmup_steps

    def _networks(self) -> list[Trainable]:
        return [self._policy] if self._critic is None else [self._policy, self._critic]

    def step(self, batch: TrainBatch) -> StepResult:
        """See TrainEngine.

        Of several ranks each gives its part of the batch, see batch_codec.part_of(), and all return the same.
        """
        result = self._try_step(batch)
        if result.refusal is None:
            return replace(result, metrics={**result.metrics, "refused": 0.0})
        for network, watch in zip(self._networks(), self._watches, strict=True):
            network.discard_gradient()
            watch.take_complaint()
        if self._settings.on_nonfinite == "skip":
            self._version += 1
        return replace(result, metrics={**result.metrics, "refused": 1.0, "trained_tokens": 0.0})

    def _try_step(self, batch: TrainBatch) -> StepResult:
        """What is refused leaves a half-summed gradient behind."""
        metrics = self._batch_metrics(batch)
        if batch.num_loss_tokens == 0:
            return StepResult(metrics=metrics, refusal="none of its tokens is fresh enough to be trained")
        batch, shaping_metrics = self._shaper.shape(batch)
        opinions = self._ask_networks(batch)
        targets, target_metrics = build_targets(batch, opinions, self._advantages, self._parts)
        metrics |= shaping_metrics | target_metrics
        counts, ratios = self._objective.counts(batch), self._batch_ratios(batch, opinions, targets)
        parts: dict[str, Metric] = {}
        last = len(batch.micro_batches) - 1
        for index, (micro_batch, target) in enumerate(zip(batch.micro_batches, targets, strict=True)):
            partial, infinite = self._accumulate(micro_batch, target, counts, ratios, is_last=index == last)
            if infinite:
                place = index * self._parts.size + infinite[0] // self.layout.ranks_per_part
                refusal = f"the loss of micro-batch {place} is not finite"
                return StepResult(metrics=metrics, refusal=refusal)
            parts = merge([parts, partial])
        if (complaint := self._complaint()) is not None:
            return StepResult(metrics=metrics, refusal=complaint)
        parts = merged_over(self._parts, parts)
        metrics |= self._observe_kl(parts, batch)
        metrics |= report(parts)
        metrics |= self._update()
        return StepResult(metrics=metrics)

    def _ask_networks(self, batch: TrainBatch) -> Opinions:
        return ask_networks(
            batch,
            policy=self._policy.forward,
            critic=self._values(),
            reference=self._reference,
            kl=self._kl,
            asks_policy=self._objective.needs_batch_ratios or self._settings.advantage in OFF_POLICY_ADVANTAGES,
        )

    def _values(self) -> Callable[..., tuple[Tensor, ...]] | None:
        """What says what states are worth, if anything does."""
        if self._network.value_head is not None:
            return self._network.values(self._policy.forward)
        return self._critic.forward if self._critic is not None else None

    def _batch_ratios(self, batch: TrainBatch, opinions: Opinions, targets: list[Targets]) -> BatchRatios | None:
        if not self._objective.needs_batch_ratios:
            return None
        assert opinions.logprobs_BT is not None
        return batch_ratios(batch, opinions.logprobs_BT, targets, self._parts)

    def _complaint(self) -> str | None:
        """What was not finite in any rank's gradient."""
        own = [watch.take_complaint() or "" for watch in self._watches]
        said = self._ranks.gather(next(filter(None, own), "").encode())
        return next((complaint.decode() for complaint in said if complaint), None)

    def _accumulate(
        self, micro: MicroBatch, target: Targets, counts: BatchCounts, ratios: BatchRatios | None, *, is_last: bool
    ) -> tuple[dict[str, Metric], tuple[int, ...]]:
        """(metrics, ranks whose loss is not finite): with one, no rank's is propagated, since all do so together."""
        with torch.set_grad_enabled(self._trains_policy):
            logprobs_BT, entropy_BT, *values = self._policy.forward(
                micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT
            )
        loss, metrics = self._objective.loss(logprobs_BT, entropy_BT, micro, target, counts, ratios)
        cost, distances = self._distance_to_reference(logprobs_BT, micro, target, counts)
        if cost is not None:
            loss = loss + cost
        for values_BT in values:  # of the value head, if there is one
            part, of_values = value_objective(values_BT, micro, target, counts, value_clip=self._settings.value_clip)
            loss, distances = loss + self._settings.value_coefficient * part, distances | of_values
        metrics |= {**distances, "loss": Sum(float(loss.detach()))}
        if infinite := self._ranks.saying(not _is_finite(metrics)):
            return metrics, infinite
        if self._trains_policy:
            self._policy.backward(loss, is_last=is_last)
        if self._critic is None:
            return metrics, ()
        of_critic, infinite = self._accumulate_critic(micro, target, counts, is_last=is_last)
        return metrics | of_critic, infinite

    def _distance_to_reference(
        self, logprobs_BT: Tensor, micro: MicroBatch, target: Targets, counts: BatchCounts
    ) -> tuple[Tensor | None, dict[str, Metric]]:
        """(what the distance costs, if that goes into the loss; metrics)."""
        if target.reference_logprobs_BT is None:
            return None, {}
        reference_logprobs_BT = target.reference_logprobs_BT.to(logprobs_BT.device)
        loss_mask_BT = micro.loss_mask_BT.to(logprobs_BT.device)
        sums = kl_metrics(logprobs_BT.detach(), reference_logprobs_BT, loss_mask_BT)
        cost = None
        if self._kl.is_in_loss:
            output = self._kl.loss(logprobs_BT, reference_logprobs_BT, loss_mask_BT, num_loss_tokens=counts.tokens)
            cost, sums = output.loss, sums | output.metrics
        num_tokens = float(micro.loss_mask_BT.sum())
        return cost, {name: Mean(total, num_tokens) for name, total in sums.items()}

    def _observe_kl(self, parts: dict[str, Metric], batch: TrainBatch) -> dict[str, float]:
        """Called for a step that will be taken: from the next one on, the coefficient is another."""
        if self._reference is None:
            return {}
        coefficient, distance = self._kl.coefficient, parts["reference_kl_k1"]
        assert isinstance(distance, Mean)
        per_trajectory = distance.total / max(int((batch.loss_tokens_N > 0).sum()), 1)
        self._kl.adapt(per_trajectory)
        return {"kl_coefficient": coefficient, "reference_kl_per_trajectory": per_trajectory}

    def _accumulate_critic(
        self, micro: MicroBatch, target: Targets, counts: BatchCounts, *, is_last: bool
    ) -> tuple[dict[str, Metric], tuple[int, ...]]:
        assert self._critic is not None
        [values_BT] = self._critic.forward(micro.token_ids_BT, micro.attention_mask_BT)
        loss, metrics = value_objective(values_BT, micro, target, counts, value_clip=self._settings.value_clip)
        infinite = self._ranks.saying(not _is_finite(metrics))
        if not infinite:
            self._critic.backward(loss, is_last=is_last)
        return metrics, infinite

    def _batch_metrics(self, batch: TrainBatch) -> dict[str, float]:
        staleness_M = torch.cat([micro.staleness_BT[micro.loss_mask_BT] for micro in batch.micro_batches])
        staleness_M = concatenated(self._parts, staleness_M)
        return {
            **report(trajectory_health(batch.rewards_N, batch.lengths_N, batch.terminated_N, staleness_M)),
            "trained_tokens": float(batch.num_loss_tokens),
            "over_stale_tokens": float(batch.num_over_stale_tokens),
        }

    def _update(self) -> dict[str, float]:
        scale = learning_rate_scale(self._version, self._settings)
        learning_rate = self._settings.learning_rate * scale if self._trains_policy else 0.0
        grad_norm = self._policy.step(learning_rate) if self._trains_policy else 0.0
        metrics = {"learning_rate": learning_rate, "grad_norm": grad_norm}
        if self._critic is not None:
            metrics["critic_grad_norm"] = self._critic.step(self._settings.critic_learning_rate * scale)
        self._shaper.keep()
        self._version += 1
        return metrics

    def snapshot_tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self._settings.publishes_adapters:
            return self._policy.gathered(self._network.adapter_parameters())
        return self._network.merged_tensors(self._policy.gathered)

    def base_model_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self._network.base_model_tensors(self._policy.gathered)

    def token_logprobs(self, token_ids_T: np.ndarray) -> np.ndarray:
        token_ids_1T = torch.from_numpy(token_ids_T.astype(np.int64))[None]
        sees_1T = torch.ones_like(token_ids_1T, dtype=torch.bool)
        asked_1T = sees_1T.clone()
        asked_1T[:, 0] = False
        assert isinstance(self._policy.module, PolicyNetwork)
        with torch.no_grad(), self._policy.module.at_temperature(1.0):
            logprobs_1T, *_ = self._policy.forward(token_ids_1T, sees_1T, asked_1T)
        return np.asarray(logprobs_1T[0, 1:].cpu().numpy())

    def copy_state(self) -> WriteState:
        own = {"version": torch.tensor(self._version), "rng": torch.get_rng_state()}
        own |= self._shaper.state() | self._kl.state()
        return copy_state(self._networks(), own, rank=self._ranks.rank, lora=self._settings.lora)

    def load(self, directory: Path) -> None:
        own = load_state(directory, self._networks(), rank=self._ranks.rank, lora=self._settings.lora)
        self._version = int(own["version"])
        torch.set_rng_state(own["rng"])
        self._shaper.restore(own)
        self._kl.restore(own)

    def export_huggingface(self, directory: Path) -> None:
        export_huggingface(directory, self._policy, model=self._settings.model, rank=self._ranks.rank)


def _is_finite(metrics: Mapping[str, Metric]) -> bool:
    """Whether the losses among them may be trained on."""
    losses = [metrics[name].value for name in ("loss", "value_loss") if name in metrics]
    return all(loss is not None and math.isfinite(loss) for loss in losses)
