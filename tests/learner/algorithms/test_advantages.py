import math

import pytest
import torch

from learner.algorithms import generalized_advantages, group_relative_advantages
from tests import oracles


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_group_relative_advantages_match_the_formula_written_as_loops(spread, normalize):
    rewards = 1.0 + spread * torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    groups = [0, 1, 0, 2, 1, 0, 0, 1, 2]
    got = group_relative_advantages(rewards, torch.tensor(groups), normalize_std=float(normalize))
    expected = oracles.group_relative(rewards.tolist(), groups, normalize=normalize, epsilon=1e-6)
    assert got.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("normalize_std", [0.0, 1.0])
def test_a_group_of_one_has_no_advantage(normalize_std):
    got = group_relative_advantages(torch.tensor([0.3, 5.0, 1.0]), torch.tensor([0, 1, 1]), normalize_std=normalize_std)
    assert got[0] == 0
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e8 / 3])
@pytest.mark.parametrize("normalize_std", [0.0, 1.0])
def test_a_group_of_equal_rewards_has_no_advantage_at_all(reward, normalize_std):
    rewards = torch.tensor([reward] * 7 + [1.0, 2.0])
    groups = torch.tensor([0] * 7 + [1, 1])
    got = group_relative_advantages(rewards, groups, normalize_std=normalize_std)
    assert got[:7].tolist() == [0.0] * 7
    assert got[8] > 0 > got[7]


MASKS = [
    [False, False, True, True, True, False],  # prompt, completion, padding
    [False, True, True, False, False, True],  # two turns with environment tokens between
    [False, True, False, False, False, False],  # one token
    [False, False, False, False, False, False],  # nothing to train on
]
TERMINATED = [True, False, False, True]


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.9, 0.8), (0.9, 0.0), (1.0, 0.95)])
def test_generalized_advantages_match_the_formula_written_as_loops(spread, gamma, gae_lambda):
    generator = torch.Generator().manual_seed(2)
    values = spread * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    rewards = torch.randn(4, generator=generator, dtype=torch.float64)
    advantages, returns = generalized_advantages(
        values, rewards, torch.tensor(MASKS), torch.tensor(TERMINATED), gamma=gamma, gae_lambda=gae_lambda
    )
    for row, (mask, terminated) in enumerate(zip(MASKS, TERMINATED, strict=True)):
        expected_advantages, expected_returns = oracles.generalized(
            values[row].tolist(), float(rewards[row]), mask, terminated=terminated, gamma=gamma, gae_lambda=gae_lambda
        )
        assert advantages[row].tolist() == pytest.approx(expected_advantages, abs=1e-12)
        assert returns[row].tolist() == pytest.approx(expected_returns, abs=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_values_of_tokens_nobody_sampled_change_nothing(poison):
    mask, terminated = torch.tensor(MASKS), torch.tensor(TERMINATED)
    values, rewards = torch.arange(24.0).reshape(4, 6), torch.tensor([1.0, 2.0, 3.0, 4.0])
    clean = generalized_advantages(values, rewards, mask, terminated, gamma=0.9, gae_lambda=0.9)
    dirty = generalized_advantages(
        torch.where(mask, values, poison), rewards, mask, terminated, gamma=0.9, gae_lambda=0.9
    )
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)


def test_a_terminated_end_is_worth_nothing_and_a_truncated_one_what_the_critic_says():
    values, mask = torch.full((2, 2), 5.0), torch.tensor([[False, True], [False, True]])
    advantages, returns = generalized_advantages(values, torch.ones(2), mask, torch.tensor([True, False]))
    assert advantages[:, 1].tolist() == [1.0 - 5.0, 1.0]
    assert returns[:, 1].tolist() == [1.0, 6.0]
