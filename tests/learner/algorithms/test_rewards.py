import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.rewards import clip_rewards, overlong_penalties, share_of_equal_groups
from tests import oracles_advantages as oracles


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=20), st.integers(1, 200), st.data(), st.sampled_from([1.0, 0.5])
)
def test_the_penalty_for_length_matches_the_formula(lengths, longest, data, penalty):
    buffer = data.draw(st.integers(1, longest))
    got = overlong_penalties(torch.tensor(lengths), max_length=longest, buffer=buffer, penalty=penalty)
    expected = [penalty * oracles.overlong(length, longest=longest, buffer=buffer) for length in lengths]
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_length_up_to_the_buffer_costs_exactly_nothing():
    assert overlong_penalties(torch.tensor([0, 90, 91, 100, 500]), max_length=100, buffer=10).tolist() == pytest.approx(
        [0.0, 0.0, -0.1, -1.0, -1.0]
    )


def test_clipped_rewards_lie_within_the_limit_and_broken_ones_are_not_mended():
    got = clip_rewards(torch.tensor([-7.0, 0.5, 3.0, math.inf, -math.inf, math.nan]), limit=2.0).tolist()
    assert got[:3] == [-2.0, 0.5, 2.0]
    assert not any(map(math.isfinite, got[3:]))


def test_groups_of_equal_rewards_are_counted():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5])
    assert share_of_equal_groups(rewards, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx(2 / 3)
    assert share_of_equal_groups(rewards, torch.tensor([0, 0, 0, 0, 0])) == 0.0
