import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms import build_advantages
from learner.algorithms.vtrace import OffPolicyEpisodes, vtrace_advantages
from tests.oracles import health as oracles

numbers = st.floats(-10, 10, width=32)
discounts = st.sampled_from([0.0, 0.5, 0.99, 1.0])


@dataclass(frozen=True)
class Path:
    """What one trajectory's trained tokens got, were thought worth and how likely they are now."""

    reward: float
    costs: list[float]
    values: list[float]
    log_ratios: list[float]
    after: float

    @property
    def rewards(self) -> list[float]:
        return [*self.costs[:-1], self.costs[-1] + self.reward] if self.costs else []


@st.composite
def paths(draw) -> Path:
    length = draw(st.integers(0, 5))
    row = st.lists(numbers, min_size=length, max_size=length)
    ratios = st.lists(st.floats(-3, 3, width=32), min_size=length, max_size=length)
    return Path(draw(numbers), draw(row), draw(row), draw(ratios), draw(numbers))


def as_tensors(some: list[Path], *, poison: float = math.nan) -> OffPolicyEpisodes:
    num_columns = max(len(path.costs) for path in some) + 1

    def table(name: str) -> torch.Tensor:
        rows = [[*getattr(path, name), *[poison] * num_columns][:num_columns] for path in some]
        return torch.tensor(rows, dtype=torch.float64)

    return OffPolicyEpisodes(
        rewards_N=torch.tensor([path.reward for path in some], dtype=torch.float64),
        group_index_N=torch.zeros(len(some), dtype=torch.int64),
        mask_NK=torch.arange(num_columns) < torch.tensor([len(path.costs) for path in some]).unsqueeze(1),
        token_rewards_NK=table("costs"),
        values_NK=table("values"),
        bootstrap_N=torch.tensor([path.after for path in some], dtype=torch.float64),
        log_ratios_NK=table("log_ratios"),
    )


@settings(max_examples=100, deadline=None)
@given(
    some=st.lists(paths(), min_size=1, max_size=4),
    gamma=discounts,
    gae_lambda=discounts,
    max_rho=st.sampled_from([0.5, 1.0, 3.0]),
    max_c=st.sampled_from([0.5, 1.0, 2.0]),
    bootstrap=st.booleans(),
)
def test_v_trace_matches_the_formula_written_as_loops(some, gamma, gae_lambda, max_rho, max_c, bootstrap):
    chosen = {"gamma": gamma, "gae_lambda": gae_lambda, "max_rho": max_rho, "max_c": max_c}
    got = build_advantages("vtrace", chosen | {"bootstrap_truncated": float(bootstrap)})(as_tensors(some))
    for n, path in enumerate(some):
        after = path.after if bootstrap else 0.0
        expected = oracles.vtrace(path.log_ratios, path.rewards, path.values, after, **chosen)
        for table, row in zip((got.advantages_NK, got.returns_NK), expected, strict=True):
            assert table[n, : len(row)].tolist() == pytest.approx(row, rel=1e-9, abs=1e-9)
            assert not table[n, len(row) :].any()


def test_on_policy_v_trace_is_the_n_step_return():
    """Espeholt et al. 2018, equation 2: whatever the critic says in between."""
    path = Path(reward=2.0, costs=[0.5, -0.25, 0.0], values=[7.0, -3.0, 1.0], log_ratios=[0.0] * 3, after=0.0)
    got = vtrace_advantages(as_tensors([path]))
    assert got.returns_NK[0, :3].tolist() == pytest.approx([2.25, 1.75, 2.0])


def test_what_the_policy_would_not_do_any_more_says_nothing_of_what_came_before():
    path = Path(reward=9.0, costs=[0.0, 0.0], values=[1.0, 2.0], log_ratios=[0.0, -100.0], after=0.0)
    got = vtrace_advantages(as_tensors([path]))
    assert got.returns_NK[0, :2].tolist() == pytest.approx([2.0, 2.0], abs=1e-6)


@pytest.mark.parametrize("name", ["gamma", "gae_lambda"])
def test_a_discount_beyond_1_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} of vtrace must be >= 0 and <= 1, got 1.5"):
        build_advantages("vtrace", {name: 1.5})


@pytest.mark.parametrize("name", ["max_rho", "max_c"])
def test_a_bound_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} of vtrace must be > 0, got 0.0"):
        build_advantages("vtrace", {name: 0.0})
