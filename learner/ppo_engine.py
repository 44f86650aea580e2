"""PpoEngine: one optimizer step of PPO on a policy and, with GAE, a critic; the networks may be on any engine."""

import math
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from learner.algorithms import build_advantages, build_loss, value_loss
from learner.algorithms.kl import kl_metrics
from learner.gradient_watch import GradientWatch
from learner.kl_control import KlControl
from learner.networks import CriticNetwork, PolicyNetwork
from learner.opinions import ask_networks
from learner.reference import ReferencePolicy
from learner.reward_shaping import RewardShaper
from learner.targets import Targets, build_targets
from learner.training import MicroBatch, StepResult, TrainBatch, TrainSettings


class Trainable(Protocol):
    """A network together with its optimizer."""

    @property
    def module(self) -> nn.Module: ...

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs; inputs may lie on any device."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds to the gradient; `is_last` says that the next call is step()."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clips, updates, clears the gradient; returns its norm before clipping."""
        ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


class PpoEngine:
    """A TrainEngine. `critic` is given exactly when the advantages are GAE, `reference` when the settings name one."""

    def __init__(
        self,
        settings: TrainSettings,
        policy: Trainable,
        critic: Trainable | None,
        reference: ReferencePolicy | None = None,
    ) -> None:
        assert isinstance(policy.module, PolicyNetwork)
        assert critic is None or isinstance(critic.module, CriticNetwork)
        self._settings = settings
        self._policy = policy
        self._critic = critic
        self._reference = reference
        self._shaper = RewardShaper(settings.rewards)
        self._kl = KlControl(settings.kl)
        self._model = policy.module.model
        self._loss = build_loss(settings.loss, settings.loss_settings)
        self._advantages = build_advantages(settings.advantage, settings.advantage_settings)
        self._watches = [GradientWatch(network.module) for network in self._networks()]
        self._version = 0

    def __repr__(self) -> str:
        return f"<PpoEngine {self._settings.model} at version {self._version}, {self._settings.loss}>"

    @property
    def version(self) -> int:
        return self._version

    def _networks(self) -> list[Trainable]:
        return [self._policy] if self._critic is None else [self._policy, self._critic]

    def step(self, batch: TrainBatch) -> StepResult:
        """See TrainEngine. A refused batch leaves a half-summed gradient behind: the engine is not to be used again."""
        metrics = _batch_metrics(batch)
        if batch.num_loss_tokens == 0:
            return StepResult(metrics=metrics, refusal="none of its tokens is fresh enough to be trained")
        batch, shaping_metrics = self._shaper.shape(batch)
        opinions = ask_networks(
            batch,
            policy=self._policy.forward,
            critic=self._critic.forward if self._critic is not None else None,
            reference=self._reference,
            kl=self._kl,
        )
        targets, target_metrics = build_targets(batch, opinions, self._advantages)
        metrics |= shaping_metrics | target_metrics
        sums: dict[str, float] = {}
        last = len(batch.micro_batches) - 1
        for index, (micro_batch, target) in enumerate(zip(batch.micro_batches, targets, strict=True)):
            partial = self._accumulate(micro_batch, target, batch.num_loss_tokens, is_last=index == last)
            for name, value in partial.items():
                sums[name] = sums.get(name, 0.0) + value
            if not math.isfinite(sums["loss"] + sums.get("value_loss", 0.0)):
                return StepResult(metrics=metrics, refusal=f"the loss of micro-batch {index} is not finite")
        for watch in self._watches:
            if (complaint := watch.take_complaint()) is not None:
                return StepResult(metrics=metrics, refusal=complaint)
        metrics |= self._observe_kl(sums, batch)
        metrics |= _means(sums, batch.num_loss_tokens)
        metrics |= self._update()
        return StepResult(metrics=metrics)

    def _accumulate(
        self, micro: MicroBatch, target: Targets, num_loss_tokens: int, *, is_last: bool
    ) -> dict[str, float]:
        logprobs_BT, entropy_BT = self._policy.forward(micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
        device = logprobs_BT.device
        output = self._loss(
            logprobs_BT,
            # One optimizer step per batch: the parameters before it are the ones just used, so the proximal policy
            # needs no forward pass of its own.
            logprobs_BT.detach(),
            micro.behavior_logprobs_BT.to(device),
            target.advantages_BT.to(device),
            micro.loss_mask_BT.to(device),
            num_loss_tokens=num_loss_tokens,
        )
        loss, kl_sums = self._held_near_reference(output.loss, logprobs_BT, micro, target, num_loss_tokens)
        sums = {**output.metrics, **kl_sums, "loss": float(loss.detach()), "entropy": float(entropy_BT.sum())}
        sums |= _mismatch(logprobs_BT.detach().cpu(), micro)
        if math.isfinite(sums["loss"]):
            self._policy.backward(loss, is_last=is_last)
        if self._critic is not None:
            sums |= self._accumulate_critic(micro, target, num_loss_tokens, is_last=is_last)
        return sums

    def _held_near_reference(
        self, loss: Tensor, logprobs_BT: Tensor, micro: MicroBatch, target: Targets, num_loss_tokens: int
    ) -> tuple[Tensor, dict[str, float]]:
        """(loss with the cost of the distance to the reference, if that is where it goes; metrics)."""
        if target.reference_logprobs_BT is None:
            return loss, {}
        reference_logprobs_BT = target.reference_logprobs_BT.to(logprobs_BT.device)
        loss_mask_BT = micro.loss_mask_BT.to(logprobs_BT.device)
        sums = kl_metrics(logprobs_BT.detach(), reference_logprobs_BT, loss_mask_BT)
        if not self._kl.is_in_loss:
            return loss, sums
        cost = self._kl.loss(logprobs_BT, reference_logprobs_BT, loss_mask_BT, num_loss_tokens=num_loss_tokens)
        return loss + cost.loss, sums | cost.metrics

    def _observe_kl(self, sums: dict[str, float], batch: TrainBatch) -> dict[str, float]:
        """Called for a step that will be taken: from the next one on, the coefficient is another."""
        if self._reference is None:
            return {}
        coefficient = self._kl.coefficient
        per_trajectory = sums["reference_kl_k1"] / max(int((batch.loss_tokens_N > 0).sum()), 1)
        self._kl.adapt(per_trajectory)
        return {"kl_coefficient": coefficient, "reference_kl_per_trajectory": per_trajectory}

    def _accumulate_critic(
        self, micro: MicroBatch, target: Targets, num_loss_tokens: int, *, is_last: bool
    ) -> dict[str, float]:
        assert self._critic is not None
        assert target.old_values_BT is not None
        assert target.returns_BT is not None
        [values_BT] = self._critic.forward(micro.token_ids_BT, micro.attention_mask_BT)
        device = values_BT.device
        output = value_loss(
            values_BT,
            target.old_values_BT.to(device),
            target.returns_BT.to(device),
            micro.loss_mask_BT.to(device),
            num_loss_tokens=num_loss_tokens,
        )
        sums = {**output.metrics, "value_loss": float(output.loss.detach())}
        if math.isfinite(sums["value_loss"]):
            self._critic.backward(output.loss, is_last=is_last)
        return sums

    def _update(self) -> dict[str, float]:
        scale = learning_rate_scale(self._version, self._settings)
        learning_rate = self._settings.learning_rate * scale
        metrics = {"learning_rate": learning_rate, "grad_norm": self._policy.step(learning_rate)}
        if self._critic is not None:
            metrics["critic_grad_norm"] = self._critic.step(self._settings.critic_learning_rate * scale)
        self._shaper.keep()
        self._version += 1
        return metrics

    def snapshot_tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter.data) for name, parameter in self._model.named_parameters()]

    def save(self, directory: Path) -> None:
        self._policy.save(directory / "policy")
        if self._critic is not None:
            self._critic.save(directory / "critic")
        state = {"version": torch.tensor(self._version), "rng": torch.get_rng_state()}
        state |= self._shaper.state() | self._kl.state()
        save_file(state, directory / "engine.safetensors")

    def load(self, directory: Path) -> None:
        self._policy.load(directory / "policy")
        if self._critic is not None:
            self._critic.load(directory / "critic")
        state = load_file(directory / "engine.safetensors")
        self._version = int(state["version"])
        torch.set_rng_state(state["rng"])
        self._shaper.restore(state)
        self._kl.restore(state)

    def export_huggingface(self, directory: Path) -> None:
        self._model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(self._settings.model).save_pretrained(directory)


def learning_rate_scale(version: int, settings: TrainSettings) -> float:
    """Share of the peak learning rate for the step that updates `version`: a warm-up, then the schedule."""
    if version < settings.warmup_steps:
        return (version + 1) / (settings.warmup_steps + 1)
    progress = (version - settings.warmup_steps) / max(settings.total_steps - settings.warmup_steps, 1)
    if settings.lr_schedule == "linear":
        return max(1.0 - progress, 0.0)
    if settings.lr_schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    return 1.0


def _mismatch(logprobs_BT: Tensor, micro: MicroBatch) -> dict[str, float]:
    """How far server and learner are apart where both mean the same parameters: should be rounding and no more."""
    same_BT = micro.loss_mask_BT & (micro.staleness_BT == 0)
    difference_N = (logprobs_BT - micro.behavior_logprobs_BT)[same_BT]
    return {"matched_tokens": float(same_BT.sum()), "mismatch_abs": float(difference_N.abs().sum())}


def _means(sums: dict[str, float], num_loss_tokens: int) -> dict[str, float]:
    """Sums over tokens become means; what the losses divided already stays."""
    matched_tokens = sums.pop("matched_tokens")
    mismatch = sums.pop("mismatch_abs")
    losses = {name: sums.pop(name) for name in ("loss", "value_loss") if name in sums}
    means = {name: value / num_loss_tokens for name, value in sums.items()}
    if matched_tokens:
        means["mismatch_abs"] = mismatch / matched_tokens
    if squared := means.pop("behavior_weight_squared", None):
        means["effective_sample_share"] = means["behavior_weight"] ** 2 / squared  # Kish 1965
    return losses | means


def _batch_metrics(batch: TrainBatch) -> dict[str, float]:
    masks = [(micro.staleness_BT, micro.loss_mask_BT) for micro in batch.micro_batches]
    staleness_N = torch.cat([staleness_BT[mask_BT] for staleness_BT, mask_BT in masks]).float()
    return {
        "reward": float(batch.rewards_N.mean()),
        "reward_std": float(batch.rewards_N.std(unbiased=False)),
        "trained_tokens": float(batch.num_loss_tokens),
        "over_stale_tokens": float(batch.num_over_stale_tokens),
        "staleness_mean": float(staleness_N.mean()) if len(staleness_N) else 0.0,
        "staleness_max": float(staleness_N.max()) if len(staleness_N) else 0.0,
    }
