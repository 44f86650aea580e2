"""PpoEngine: one optimizer step of PPO on a policy and, with GAE, a critic; the networks may be on any engine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from learner.algorithms import build_advantages, build_loss, value_loss
from learner.networks import CriticNetwork, PolicyNetwork
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


class GradientWatch:
    """Sees every gradient as it is computed, before an engine reduces, partitions or clips it."""

    def __init__(self, module: nn.Module) -> None:
        self._bad: set[str] = set()
        for name, parameter in module.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self._look(name, gradient))

    def _look(self, name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient.sum()):
            self._bad.add(name)

    def take_complaint(self) -> str | None:
        """What was not finite since the last call, for people."""
        bad, self._bad = sorted(self._bad), set()
        return f"the gradient of {bad[0]} and {len(bad) - 1} more tensors is not finite" if bad else None


@dataclass(frozen=True, slots=True)
class Targets:
    """What a micro-batch is trained towards."""

    advantages_BT: Tensor
    old_values_BT: Tensor | None = None
    returns_BT: Tensor | None = None


class PpoEngine:
    """A TrainEngine. `critic` is given exactly when the advantages are GAE."""

    def __init__(self, settings: TrainSettings, policy: Trainable, critic: Trainable | None) -> None:
        assert isinstance(policy.module, PolicyNetwork)
        assert critic is None or isinstance(critic.module, CriticNetwork)
        self._settings = settings
        self._policy = policy
        self._critic = critic
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
        sums: dict[str, float] = {}
        last = len(batch.micro_batches) - 1
        targets = self._targets(batch)
        for index, (micro_batch, target) in enumerate(zip(batch.micro_batches, targets, strict=True)):
            partial = self._accumulate(micro_batch, target, batch.num_loss_tokens, is_last=index == last)
            for name, value in partial.items():
                sums[name] = sums.get(name, 0.0) + value
            if not math.isfinite(sums["loss"] + sums.get("value_loss", 0.0)):
                return StepResult(metrics=metrics, refusal=f"the loss of micro-batch {index} is not finite")
        for watch in self._watches:
            if (complaint := watch.take_complaint()) is not None:
                return StepResult(metrics=metrics, refusal=complaint)
        metrics |= _means(sums, batch.num_loss_tokens)
        metrics |= self._update()
        return StepResult(metrics=metrics)

    def _targets(self, batch: TrainBatch) -> list[Targets]:
        if self._critic is None:
            advantages_N = self._advantages(batch.rewards_N, batch.group_index_N)
            return [
                Targets(advantages_N[micro.trajectory_index_B].unsqueeze(1) * micro.loss_mask_BT)
                for micro in batch.micro_batches
            ]
        targets: list[Targets] = []
        for micro in batch.micro_batches:
            with torch.no_grad():
                [values_BT] = self._critic.forward(micro.token_ids_BT, micro.attention_mask_BT)
            values_BT = values_BT.cpu()
            advantages_BT, returns_BT = self._advantages(
                values_BT, micro.rewards_B, micro.loss_mask_BT, micro.terminated_B
            )
            targets.append(Targets(advantages_BT, values_BT, returns_BT))
        return _whiten(targets, batch.micro_batches)

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
        sums = {**output.metrics, "loss": float(output.loss.detach()), "entropy": float(entropy_BT.sum())}
        sums |= _mismatch(logprobs_BT.detach().cpu(), micro)
        if math.isfinite(sums["loss"]):
            self._policy.backward(output.loss, is_last=is_last)
        if self._critic is not None:
            sums |= self._accumulate_critic(micro, target, num_loss_tokens, is_last=is_last)
        return sums

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
        self._version += 1
        return metrics

    def snapshot_tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter.data) for name, parameter in self._model.named_parameters()]

    def save(self, directory: Path) -> None:
        self._policy.save(directory / "policy")
        if self._critic is not None:
            self._critic.save(directory / "critic")
        state = {"version": torch.tensor(self._version), "rng": torch.get_rng_state()}
        save_file(state, directory / "engine.safetensors")

    def load(self, directory: Path) -> None:
        self._policy.load(directory / "policy")
        if self._critic is not None:
            self._critic.load(directory / "critic")
        state = load_file(directory / "engine.safetensors")
        self._version = int(state["version"])
        torch.set_rng_state(state["rng"])

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


def _whiten(targets: Sequence[Targets], micro_batches: Sequence[MicroBatch]) -> list[Targets]:
    """Advantages of the whole batch with mean 0 and standard deviation 1 over the loss tokens."""
    pairs = list(zip(targets, micro_batches, strict=True))
    all_N = torch.cat([target.advantages_BT[micro.loss_mask_BT] for target, micro in pairs])
    mean, std = all_N.mean(), all_N.std(unbiased=False)
    return [
        Targets(
            torch.where(micro.loss_mask_BT, (target.advantages_BT - mean) / (std + 1e-6), 0.0),
            target.old_values_BT,
            target.returns_BT,
        )
        for target, micro in pairs
    ]


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
