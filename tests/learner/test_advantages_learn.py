"""Every advantage teaches a tiny policy a tiny task, on-policy and on plain torch; a strong reference prevents it."""

import numpy as np
import pytest
import torch

from common.trajectory import FinishReason, Group, Trajectory
from learner.algorithms import ADVANTAGES
from learner.loss_settings import WITH_CRITIC
from learner.ppo_engine import PpoEngine
from learner.reward_settings import KlSettings
from learner.torch_engine import open_torch_engine
from tests.builders_learner import a_batch, a_group, some_train_settings
from tests.models import VOCAB_SIZE, save_tiny_model

PROMPT = (5, 6)
NUM_TOKENS, GROUPS, GROUP_SIZE, STEPS = 3, 4, 8, 25
GOOD_IDS = VOCAB_SIZE // 2  # the reward is the share of sampled tokens below it


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


@torch.no_grad()
def sample(engine: PpoEngine, generator: torch.Generator) -> list[Group]:
    """By the engine's own policy, with its true log-probabilities."""
    network = engine._policy.module
    ids = torch.tensor([PROMPT]).repeat(GROUPS * GROUP_SIZE, 1)
    logprobs = torch.zeros(ids.shape)
    for _ in range(NUM_TOKENS):
        all_logprobs = (network.model(ids).logits[:, -1] / 0.9).log_softmax(dim=-1)
        token = torch.multinomial(all_logprobs.exp(), 1, generator=generator)
        ids = torch.cat([ids, token], dim=1)
        logprobs = torch.cat([logprobs, all_logprobs.gather(1, token)], dim=1)
    trajectories = [
        a_sampled_trajectory(*row, engine.version) for row in zip(ids.numpy(), logprobs.numpy(), strict=True)
    ]
    return [a_group(*trajectories[start : start + GROUP_SIZE]) for start in range(0, len(trajectories), GROUP_SIZE)]


def a_sampled_trajectory(ids: np.ndarray, logprobs: np.ndarray, version: int) -> Trajectory:
    mask = np.arange(ids.size) >= len(PROMPT)
    return Trajectory(
        token_ids=ids.astype(np.int32),
        loss_mask=mask,
        behavior_logprobs=logprobs.astype(np.float32),
        token_versions=np.where(mask, version, -1).astype(np.int32),
        reward=float((ids[mask] < GOOD_IDS).mean()),
        finish_reason=FinishReason.TERMINATED,
    )


def rewards_over_training(model: str, **overrides) -> list[float]:
    critic = model if overrides.get("advantage") in WITH_CRITIC and not overrides.get("value_head") else None
    engine = open_torch_engine(
        some_train_settings(
            model, critic_model=critic, learning_rate=2e-3, critic_learning_rate=1e-2, warmup_steps=0,
            lr_schedule="constant", weight_decay=0.0, **overrides,
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    rewards = []
    for _ in range(STEPS):
        batch = a_batch(sample(engine, generator), version=engine.version)
        rewards.append(float(batch.rewards_N.mean()))
        assert engine.step(batch).refusal is None
    return rewards


def gain(rewards: list[float]) -> float:
    return sum(rewards[-5:]) / 5 - rewards[0]


@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
def test_the_policy_learns(model, advantage):
    assert gain(rewards_over_training(model, advantage=advantage)) > 0.25


@pytest.mark.parametrize("advantage", WITH_CRITIC)
def test_the_policy_learns_with_a_value_head(model, advantage):
    assert gain(rewards_over_training(model, advantage=advantage, value_head=True)) > 0.25


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_near_a_reference_that_costs_much_to_leave_little_is_learned(model, place):
    kl = KlSettings(coefficient=5.0, place=place, reference_model=model)
    assert gain(rewards_over_training(model, advantage="rloo", kl=kl)) < 0.12
