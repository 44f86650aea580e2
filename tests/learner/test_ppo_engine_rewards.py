"""PpoEngine with every advantage, a reference and shaped rewards, on plain torch."""

import math
from dataclasses import replace

import pytest
import torch

from common.trajectory import Group
from learner.algorithms import ADVANTAGES
from learner.algorithms.kl import adapted_coefficient
from learner.loss_settings import WITH_CRITIC
from learner.ppo_engine import PpoEngine
from learner.reward_settings import GROUP_RELATIVE, KlSettings, RewardSettings
from learner.torch_engine import open_torch_engine
from tests.builders_learner import (
    a_batch,
    a_group,
    a_trajectory,
    gradients_of_one_step,
    largest_difference,
    random_groups,
    some_train_settings,
    train,
    weights_of,
    with_nan,
)
from tests.models import save_tiny_model

NEVER_CLIPPED = 1e9  # a norm that was clipped is the same whatever the gradient was divided by
RUNNING = RewardSettings(normalization="running", clip=2.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> str:
    """Another policy over the same tokens."""
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1, tied=True))


def an_engine(model: str, **overrides) -> PpoEngine:
    critic = model if overrides.get("advantage") in WITH_CRITIC else None
    return open_torch_engine(some_train_settings(model, critic_model=critic, **overrides))


def near(reference: str, coefficient: float = 0.1, place: str = "loss", **settings) -> KlSettings:
    return KlSettings(coefficient=coefficient, place=place, reference_model=reference, **settings)


@pytest.mark.parametrize("place", ["none", "loss", "reward"])
@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
def test_the_size_of_micro_batches_does_not_change_the_update(model, other_model, advantage, place):
    kl = KlSettings() if place == "none" else near(other_model, place=place)
    gradients = []
    for tokens in (40, 10_000):
        rewards = RewardSettings(normalization="batch")
        engine = an_engine(model, advantage=advantage, kl=kl, rewards=rewards, max_grad_norm=NEVER_CLIPPED)
        gradients.append(gradients_of_one_step(engine, a_batch(random_groups(0), micro_batch_tokens=tokens)))
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    assert largest > 1e-2
    assert largest_difference(*gradients) < 2e-6 * max(largest, 1.0)


def test_the_distance_of_a_policy_from_itself_is_exactly_nothing(model):
    engine = an_engine(model, kl=near(model))
    metrics = engine.step(a_batch(random_groups(0), micro_batch_tokens=40)).metrics
    assert metrics["reference_kl_k1"] == metrics["reference_kl_k3"] == metrics["kl_loss"] == 0.0
    assert engine.step(a_batch(random_groups(1), version=1)).metrics["reference_kl_k3"] > 0


def test_a_reference_without_a_coefficient_is_measured_and_changes_nothing(model, other_model):
    batch = a_batch(random_groups(0))
    watched = an_engine(model, kl=KlSettings(reference_model=other_model))
    plain = an_engine(model)
    metrics = watched.step(batch).metrics
    assert metrics["reference_kl_k3"] > 0
    assert "kl_loss" not in metrics
    assert "reference_kl_k3" not in plain.step(batch).metrics
    assert largest_difference(weights_of(watched), weights_of(plain)) == 0.0


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_where_no_reward_differs_the_policy_is_pulled_to_the_reference(model, other_model, estimator):
    engine = an_engine(
        model, kl=near(other_model, estimator=estimator), learning_rate=1e-3, lr_schedule="constant",
        warmup_steps=0, weight_decay=0.0, loss="ppo",
    )  # fmt: skip
    batch = replace(a_batch(random_groups(0)), rewards_N=torch.zeros(12))
    distances = [engine.step(batch).metrics["reference_kl_k3"] for _ in range(6)]
    assert distances[-1] < 0.9 * distances[0]


def test_in_the_reward_a_token_costs_its_log_ratio_by_the_policy_of_the_step(model, other_model):
    """Its advantage is the sum of what it and the tokens after it cost."""
    engine = an_engine(model, kl=near(other_model, 0.5, "reward"), advantage="reinforce", loss="ppo")
    batch = a_batch([a_group(a_trajectory((0, 1, 1, 0, 1), reward=0.0))])
    [micro] = batch.micro_batches
    with torch.no_grad():
        inputs = (micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
        policy_BT, _ = engine._policy.forward(*inputs)
        [reference_BT] = engine._reference.logprobs([micro])
    costs = [0.5 * float(policy_BT[0, t] - reference_BT[0, t]) for t in (1, 2, 4)]
    caught: list[torch.Tensor] = []
    objective = engine._objective.loss

    def catching(logprobs_BT, entropy_BT, micro, target, *others):
        caught.append(target.advantages_BT)
        return objective(logprobs_BT, entropy_BT, micro, target, *others)

    engine._objective.loss = catching
    engine.step(batch)
    expected = [0.0, -sum(costs), -sum(costs[1:]), 0.0, -costs[2]]
    assert caught[0][0].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_coefficient_of_a_step_is_the_one_reported_and_adapts_afterwards(model, other_model):
    engine = an_engine(model, kl=near(other_model, 0.1, target=1e-3))
    expected = 0.1
    for result in train(engine, steps=3):
        assert result.metrics["kl_coefficient"] == expected
        expected = adapted_coefficient(expected, result.metrics["reference_kl_per_trajectory"], target=1e-3)
    assert expected != 0.1
    fixed = an_engine(model, kl=near(other_model, 0.1))
    assert [result.metrics["kl_coefficient"] for result in train(fixed, steps=2)] == [0.1, 0.1]


def test_the_distance_per_trajectory_counts_those_that_are_trained(model, other_model):
    stale = a_group(a_trajectory(versions=0), a_trajectory(versions=0, reward=0.0))
    fresh = a_group(a_trajectory(versions=9), a_trajectory(versions=9, reward=0.0))
    metrics = an_engine(model, kl=near(other_model)).step(a_batch([stale, fresh], version=9)).metrics
    assert metrics["reference_kl_per_trajectory"] == pytest.approx(2 * metrics["reference_kl_k1"])


RESUMED = {
    "adapting, in the loss": {"target": 1e-3},
    "adapting, in the reward": {"target": 1e-3, "place": "reward"},
}


@pytest.mark.parametrize("advantage", ["reinforce_plus_plus", "gae"])
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_engine_continues_bit_identically(model, other_model, kind, advantage, tmp_path):
    settings = {"kl": near(other_model, **RESUMED[kind]), "rewards": RUNNING, "advantage": advantage}
    engine = an_engine(model, **settings)
    train(engine, steps=2)
    engine.copy_state()(tmp_path)
    expected = train(engine, steps=2)
    resumed = an_engine(model, seed=99, **settings)
    resumed.load(tmp_path)
    assert train(resumed, steps=2) == expected
    assert largest_difference(weights_of(resumed), weights_of(engine)) == 0.0


def test_a_resumed_run_is_still_held_near_the_model_it_began_with(model, tmp_path):
    engine = an_engine(model, kl=near(model))
    train(engine, steps=2)
    engine.copy_state()(tmp_path)
    resumed = an_engine(model, kl=near(model))
    resumed.load(tmp_path)
    [result] = train(resumed, steps=1)
    assert result.metrics["reference_kl_k3"] > 0
    assert result == train(engine, steps=1)[0]


def test_a_run_that_begins_to_adapt_begins_at_the_coefficient_it_is_given(model, tmp_path):
    engine = an_engine(model)
    train(engine, steps=1)
    engine.copy_state()(tmp_path)
    resumed = an_engine(model, kl=near(model, 0.3, target=5.0), rewards=RUNNING)
    resumed.load(tmp_path)
    assert train(resumed, steps=1)[0].metrics["kl_coefficient"] == 0.3


def test_a_refused_step_leaves_no_trace_in_what_a_checkpoint_holds(model, other_model, tmp_path):
    engine = an_engine(model, kl=near(other_model, target=1e-3), rewards=RUNNING)
    train(engine, steps=1)
    before = engine._shaper.state() | engine._kl.state()
    assert before["reward_moments"][0] == 12
    batch = a_batch(random_groups(1), version=1, micro_batch_tokens=40)
    assert "is not finite" in engine.step(with_nan(batch, "rewards_N")).refusal
    assert "is not finite" in engine.step(with_nan(batch, "behavior_logprobs_BT")).refusal
    after = engine._shaper.state() | engine._kl.state()
    assert {name: tensor.tolist() for name, tensor in after.items()} == {
        name: tensor.tolist() for name, tensor in before.items()
    }


@pytest.mark.parametrize("advantage", sorted(set(GROUP_RELATIVE) - {"reinforce_plus_plus_baseline"}))
def test_a_step_without_equal_groups_is_the_step_that_never_saw_them(model, advantage):
    learns = random_groups(0)
    equal = a_group(*[a_trajectory(reward=0.1) for _ in range(5)])

    def gradients(groups: list[Group], **rewards: bool) -> dict[str, torch.Tensor]:
        shaping = RewardSettings(**rewards)
        engine = an_engine(model, advantage=advantage, rewards=shaping, max_grad_norm=NEVER_CLIPPED)
        return gradients_of_one_step(engine, a_batch(groups))

    expected = gradients([*learns])
    assert largest_difference(gradients([equal, *learns], drop_equal_groups=True), expected) < 1e-6
    assert largest_difference(gradients([equal, *learns]), expected) > 1e-3


def test_when_every_group_is_equal_the_run_goes_on_and_nothing_is_learned(model):
    engine = an_engine(model, rewards=RewardSettings(drop_equal_groups=True), weight_decay=0.0)
    before = weights_of(engine)
    result = engine.step(a_batch([a_group(*[a_trajectory(reward=0.1) for _ in range(4)])]))
    assert (result.refusal, engine.version) == (None, 1)
    assert result.metrics["trained_tokens"] == 0
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert largest_difference(weights_of(engine), before) == 0.0


def test_truncated_trajectories_are_compared_with_but_not_trained_on(model):
    long, short = (0, 1, 1, 1, 1), (0, 1, 1)
    group = a_group(
        a_trajectory(short, reward=1.0, token_ids=[5, 6, 7]),
        a_trajectory(long, reward=0.0, terminated=False),
    )
    engine = an_engine(model, rewards=RewardSettings(drop_truncated=True), advantage="dr_grpo", warmup_steps=0)
    metrics = engine.step(a_batch([group])).metrics
    assert (metrics["trained_tokens"], metrics["dropped_tokens"], metrics["advantage_mean"]) == (2, 4, 0.5)


def test_the_reward_that_was_given_is_reported_beside_the_one_that_was_learned_from(model):
    engine = an_engine(model, rewards=RewardSettings(overlong_buffer=4, overlong_length=4))
    metrics = engine.step(a_batch([a_group(a_trajectory(reward=1.0), a_trajectory(reward=0.0))])).metrics
    assert (metrics["reward"], metrics["shaped_reward"]) == (0.5, 0.0)


def test_settings_that_make_no_sense_together_are_refused_by_the_engines_settings_too():
    with pytest.raises(ValueError, match="with advantage gae a group of equal rewards has a gradient"):
        some_train_settings("m", advantage="gae", critic_model="m", rewards=RewardSettings(drop_equal_groups=True))
