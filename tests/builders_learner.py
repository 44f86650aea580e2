"""Builders for the learner's tests: valid by default, every value can be overridden."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory
from learner.batching import build_batch
from learner.ppo_engine import PpoEngine
from learner.training import ALONE_AND_PADDED, BatchLayout, StepResult, TrainBatch, TrainEngine, TrainSettings
from tests.models import VOCAB_SIZE

MAX_STALENESS = 2


def a_trajectory(
    mask: Sequence[int] = (0, 0, 1, 1),
    *,
    versions: Sequence[int] | int = 0,  # of the sampled tokens
    reward: float = 1.0,
    terminated: bool = True,
    token_ids: Sequence[int] | None = None,
    behavior_logprob: float = -1.0,
) -> Trajectory:
    """One trajectory; where `mask` is 1 the policy sampled the token."""
    loss_mask = np.array(mask, dtype=bool)
    token_versions = np.full(loss_mask.size, NOT_SAMPLED, dtype=np.int32)
    token_versions[loss_mask] = versions
    ids = np.arange(3, 3 + loss_mask.size) if token_ids is None else np.array(token_ids)
    return Trajectory(
        token_ids=ids.astype(np.int32),
        loss_mask=loss_mask,
        behavior_logprobs=np.where(loss_mask, behavior_logprob, 0.0).astype(np.float32),
        token_versions=token_versions,
        reward=reward,
        finish_reason=FinishReason.TERMINATED if terminated else FinishReason.TRUNCATED,
    )


def a_group(*trajectories: Trajectory, task_id: int = 0) -> Group:
    return Group(lease_id=task_id, task_id=task_id, trajectories=trajectories)


def random_groups(
    seed: int,
    *,
    num_groups: int = 3,
    group_size: int = 4,
    version: int = 0,
    sampled_tokens: int | None = None,
    shared: int = 0,
) -> tuple[Group, ...]:
    """Prompts, completions and environment tokens of random lengths, some of them sampled a version earlier.

    sampled_tokens: of the first answer in each; default: a few. shared: tokens that all in a group begin with.
    """
    rng = np.random.default_rng(seed)
    groups = [[_random_trajectory(rng, version, sampled_tokens) for _ in range(group_size)] for _ in range(num_groups)]
    for group in groups:
        for trajectory in group[1:]:
            trajectory.token_ids[:shared] = group[0].token_ids[:shared]
    return tuple(a_group(*group, task_id=index) for index, group in enumerate(groups))


def _random_trajectory(rng: np.random.Generator, version: int, sampled_tokens: int | None) -> Trajectory:
    mask = [0] * rng.integers(2, 5) + [1] * (sampled_tokens or rng.integers(1, 8))
    if rng.random() < 0.5:
        mask += [0] * 2 + [1] * rng.integers(1, 4)
    num_sampled = sum(mask)
    return a_trajectory(
        mask,
        versions=np.sort(rng.integers(max(version - 1, 0), version + 1, num_sampled)).tolist(),
        reward=float(rng.normal()),
        terminated=bool(rng.random() < 0.7),
        token_ids=rng.integers(3, VOCAB_SIZE, len(mask)).tolist(),
        behavior_logprob=-float(rng.uniform(2.0, 5.0)),
    )


def a_batch(
    groups: Sequence[Group],
    *,
    version: int = 0,
    micro_batch_tokens: int = 1000,
    layout: BatchLayout = ALONE_AND_PADDED,
) -> TrainBatch:
    return build_batch(
        groups,
        version=version,
        max_staleness=MAX_STALENESS,
        micro_batch_tokens=micro_batch_tokens,
        layout=layout,
    )


def some_train_settings(model: str, **overrides: Any) -> TrainSettings:
    values: dict[str, Any] = {
        "model": model,
        "learning_rate": 1e-2,
        "critic_learning_rate": 3e-2,
        "total_steps": 10,
        "lr_schedule": "linear",
        "warmup_steps": 1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
        "max_staleness": MAX_STALENESS,
        "temperature": 0.9,
    }
    return TrainSettings(**(values | overrides))


def train(engine: TrainEngine, *, steps: int, micro_batch_tokens: int = 40, shared: int = 0) -> list[StepResult]:
    """Steps on batches that depend on the version alone, of several micro-batches each; shared: see random_groups()."""
    results = []
    for _ in range(steps):
        groups = random_groups(engine.version, version=engine.version, shared=shared)
        batch = a_batch(groups, version=engine.version, micro_batch_tokens=micro_batch_tokens)
        assert len(batch.micro_batches) > 2
        result = engine.step(batch)
        assert result.refusal is None, result.refusal
        results.append(result)
    return results


def gradients_of_one_step(engine: PpoEngine, batch: TrainBatch) -> dict[str, torch.Tensor]:
    """As the optimizer gets them; Adam's first step would hide their size and blow up their rounding errors."""
    gradients: dict[str, torch.Tensor] = {}
    for index, network in enumerate(engine._networks()):

        def catch(optimizer, *_, index=index, module=network.module) -> None:
            for name, parameter in module.named_parameters():
                gradients[f"{index} {name}"] = parameter.grad.clone()

        network.optimizer.register_step_pre_hook(catch)
    assert engine.step(batch).refusal is None
    return gradients


def weights_of(engine: TrainEngine, settings: TrainSettings | None = None) -> dict[str, torch.Tensor]:
    """What is published; with settings that publish adapters also what these stand beside."""
    if settings is not None and settings.publishes_adapters:
        return weights_of(engine) | {name: tensor.detach().clone() for name, tensor in engine.base_model_tensors()}
    return {name: tensor.detach().clone() for name, tensor in engine.snapshot_tensors()}


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name].detach().float() - other[name].detach().float()).abs().max()) for name in one)


def with_nan(batch: TrainBatch, name: str) -> TrainBatch:
    """The batch with one nan: in its last trajectory's reward, or in field `name` of its last micro-batch.

    There it stands at a token that is trained on.
    """
    if name == "rewards_N":
        rewards_N = batch.rewards_N.clone()
        rewards_N[-1] = float("nan")
        return replace(batch, rewards_N=rewards_N)
    *others, last = batch.micro_batches
    tensor_BT = getattr(last, name).clone()
    row, token = last.loss_mask_BT.nonzero()[0].tolist()
    tensor_BT[row, token] = float("nan")
    return replace(batch, micro_batches=[*others, replace(last, **{name: tensor_BT})])


BREAKS = ("gradient", "loss")
"""Ways to break a step, each after other micro-batches have added to the gradient; the second before the last has."""


def refuse_a_batch(engine: PpoEngine, breaks: str) -> None:
    """Give the engine, at its version, a batch that it refuses; with one that trains a critic, that breaks it."""
    batch = a_batch(random_groups(99, version=engine.version), version=engine.version, micro_batch_tokens=40)
    if breaks == "loss":
        result = engine.step(with_nan(batch, "behavior_logprobs_BT"))
    else:
        body = next(module for name, module in engine._networks()[-1].module.named_modules() if name.endswith("1.mlp"))
        calls = 0

        def spoil(_module: torch.nn.Module, inputs: Any, _outputs: Any) -> Any:
            nonlocal calls
            calls += 1
            return tuple(each * (float("nan") if calls == len(batch.micro_batches) else 1.0) for each in inputs)

        handle = body.register_full_backward_hook(spoil)
        result = engine.step(batch)
        handle.remove()
    assert result.refusal is not None, breaks
    assert "is not finite" in result.refusal
