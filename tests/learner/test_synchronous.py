"""PpoEngine against the plain synchronous trainer, which shares no code with it: the same tokens, step for step."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest

from learner.torch_engine import open_torch_engine
from learner.training import TrainSettings
from tests.builders_learner import a_batch, a_group, a_trajectory, largest_difference, weights_of
from tests.models import VOCAB_SIZE, save_tiny_model
from tests.oracles.synchronous import Sample, SynchronousTrainer

STEPS, GROUPS, GROUP_SIZE = 4, 3, 4
LEARNING_RATE = 1e-4


def draw(rng: np.random.Generator) -> list[list[Sample]]:
    """Prompts of a group are the same, completions are of all lengths."""
    return [
        [
            Sample(prompt_ids=prompt, token_ids=rng.integers(5, VOCAB_SIZE, rng.integers(1, 7)).tolist())
            for _ in range(GROUP_SIZE)
        ]
        for prompt in (rng.integers(5, VOCAB_SIZE, rng.integers(1, 5)).tolist() for _ in range(GROUPS))
    ]


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_every_step_is_that_of_the_plain_synchronous_trainer(tmp_path, micro_batch_tokens):
    model = str(save_tiny_model(tmp_path / "model", tied=True))
    trainer = SynchronousTrainer(model, learning_rate=LEARNING_RATE, betas=(0.9, 0.95), epsilon=1e-8, max_grad_norm=1.0)
    engine = open_torch_engine(TrainSettings(model=model, learning_rate=LEARNING_RATE, total_steps=STEPS))
    start = weights_of(engine)
    rng = np.random.default_rng(0)
    for version in range(STEPS):
        drawn = draw(rng)
        rewards = rng.normal(size=GROUPS * GROUP_SIZE).tolist()
        expected = trainer.step(drawn, partial(next_of, iter(rewards)))
        groups = groups_of(drawn, rewards, expected.logprobs, version)
        result = engine.step(a_batch(groups, version=version, micro_batch_tokens=micro_batch_tokens))
        assert result.metrics["loss"] == pytest.approx(expected.loss, abs=1e-6)
        assert result.metrics["grad_norm"] == pytest.approx(expected.grad_norm, rel=1e-5)
        assert result.metrics["mismatch_abs"] < 1e-5
        assert largest_difference(weights_of(engine), expected.weights) < 1e-5
    assert largest_difference(weights_of(engine), start) > 2e-4


def next_of(rewards: Iterator[float], prompt: str, completion: str) -> float:
    del prompt, completion  # of made up tokens, which mean nothing
    return next(rewards)


def groups_of(drawn, rewards: list[float], logprobs: list[list[float]], version: int):
    samples = iter(zip(rewards, logprobs, strict=True))
    groups = []
    for group in drawn:
        trajectories = []
        for sample in group:
            reward, behavior = next(samples)
            mask = [0] * len(sample.prompt_ids) + [1] * len(sample.token_ids)
            trajectory = a_trajectory(
                mask, versions=version, reward=reward, token_ids=sample.prompt_ids + sample.token_ids
            )
            trajectory.behavior_logprobs[trajectory.loss_mask] = behavior
            trajectories.append(trajectory)
        groups.append(a_group(*trajectories))
    return groups
