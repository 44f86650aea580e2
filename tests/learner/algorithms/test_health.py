import math
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms.health import (
    advantage_health,
    critic_health,
    policy_health,
    trajectory_health,
    weight_health,
)
from learner.algorithms.metrics import (
    EffectiveShare,
    ExplainedVariance,
    Largest,
    Mean,
    Smallest,
    Spread,
    Sum,
    merge,
    report,
    token_means,
)
from learner.algorithms.moments import Moments
from tests.builders_algorithms import MASK, Drawn, draw
from tests.oracles import health as oracles

numbers = st.lists(st.floats(-100, 100, width=32), max_size=12)
SPREADS = pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])


def health_of(drawn: Drawn, mask_BT: torch.Tensor = MASK) -> dict[str, float]:
    samples = drawn.samples
    return report(
        policy_health(
            samples.current_logprobs_BT, samples.behavior_logprobs_BT, drawn.entropy_BT, drawn.staleness_BT, mask_BT
        )
    )


@SPREADS
@pytest.mark.parametrize("seed", range(3))
def test_the_policys_health_matches_the_formulas_written_as_loops(spread, seed):
    drawn = draw(spread, seed=seed)
    assert health_of(drawn) == pytest.approx(oracles.policy(drawn.rows), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_lies_outside_the_mask_is_not_seen(poison):
    clean = draw(0.5)
    samples = clean.samples
    dirty = [
        torch.where(MASK, tensor, poison)
        for tensor in (samples.current_logprobs_BT, samples.behavior_logprobs_BT, clean.entropy_BT)
    ]
    assert report(policy_health(*dirty, clean.staleness_BT, MASK)) == health_of(clean)


def test_where_server_and_learner_agree_there_is_no_mismatch_however_old_other_tokens_are():
    drawn = draw(1.0)
    samples = drawn.samples
    behavior = torch.where(drawn.staleness_BT == 0, samples.current_logprobs_BT, samples.behavior_logprobs_BT)
    got = report(policy_health(samples.current_logprobs_BT, behavior, drawn.entropy_BT, drawn.staleness_BT, MASK))
    assert (got["mismatch_k1"], got["mismatch_k3"], got["mismatch_abs"]) == (0, 0, 0)
    assert got["staleness_k3"] > 0.1


def test_nothing_is_said_of_what_was_not_seen():
    nothing = torch.zeros_like(MASK)
    assert health_of(draw(1.0), nothing) == {}
    assert report(weight_health(torch.ones(MASK.shape), MASK, nothing)) == {}
    assert report(advantage_health(torch.zeros(0))) == {}
    assert report(critic_health(torch.zeros(0), torch.zeros(0))) == {}
    fresh = report(trajectory_health(torch.ones(1), torch.ones(1), torch.ones(1, dtype=torch.bool), torch.zeros(0)))
    assert "staleness_mean" not in fresh


def test_the_weights_health_is_of_what_is_left_of_them():
    kept, weights = torch.tensor([[True, True, False]]), torch.tensor([[1.0, 3.0, 100.0]])
    got = report(weight_health(weights, kept, torch.ones(1, 3, dtype=torch.bool)))
    assert got == pytest.approx(
        {
            "weight_mean": 4 / 3,
            "weight_max": 3.0,
            "weight_effective_share": oracles.effective_share([1.0, 3.0, 0.0]),
        }
    )


def test_one_token_that_weighs_everything_is_worth_one_of_them():
    assert EffectiveShare(Moments.of(torch.tensor([0.0, 0.0, 0.0, 9.0]))).value == pytest.approx(0.25)
    assert EffectiveShare(Moments.of(torch.full((7,), 0.3))).value == pytest.approx(1.0)
    assert EffectiveShare(Moments.of(torch.zeros(3))).value is None


def test_the_trajectories_health_is_of_them_as_they_came():
    got = trajectory_health(
        torch.tensor([1.0, 0.0, 0.0, 1.0]),
        torch.tensor([3, 5, 2, 2]),
        torch.tensor([True, False, True, True]),
        torch.tensor([0, 0, 2, 1], dtype=torch.int32),
    )
    assert report(got) == pytest.approx(
        {
            "reward": 0.5, "reward_std": 0.5, "length_mean": 3.0, "length_min": 2, "length_max": 5, "truncated": 0.25,
            "staleness_mean": 0.75, "staleness_min": 0, "staleness_max": 2,
        }
    )  # fmt: skip


@given(numbers.filter(bool))
def test_the_spread_of_advantages_matches_the_formula(advantages):
    got = report(advantage_health(torch.tensor(advantages)))
    names = ("advantage_mean", "advantage_std", "advantage_min", "advantage_max")
    assert [got[name] for name in names] == pytest.approx(oracles.spread(advantages), rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.floats(-10, 10, width=16), st.floats(-10, 10, width=16)), min_size=2, max_size=12))
def test_the_explained_variance_matches_the_formula(pairs):
    returns, values = ([pair[i] for pair in pairs] for i in (0, 1))
    got = report(critic_health(torch.tensor(returns), torch.tensor(values)))
    if max(returns) - min(returns) < 0.01:
        return  # one rounding error over another
    assert got["explained_variance"] == pytest.approx(oracles.explained_variance(returns, values), rel=1e-5, abs=1e-4)


def test_a_critic_that_knows_explains_all_and_one_that_says_a_constant_nothing():
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert critic_health(returns, returns)["explained_variance"].value == 1.0
    assert critic_health(returns, torch.full((3,), 7.0))["explained_variance"].value == pytest.approx(0.0)
    assert critic_health(torch.full((3,), 7.0), returns)["explained_variance"].value is None


KINDS = {
    "sum": lambda values: Sum(math.fsum(values)),
    "mean": lambda values: Mean(math.fsum(values), len(values)),
    "largest": lambda values: Largest(max(values, default=-math.inf)),
    "smallest": lambda values: Smallest(min(values, default=math.inf)),
    "spread": lambda values: Spread(Moments.of(torch.tensor(values, dtype=torch.float64))),
    "share": lambda values: EffectiveShare(Moments.of(torch.tensor(values, dtype=torch.float64))),
    "explained": lambda values: ExplainedVariance(
        Moments.of(torch.tensor(values, dtype=torch.float64)),
        Moments.of(torch.tensor([0.5 * value for value in values], dtype=torch.float64)),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(numbers, min_size=1, max_size=4), order=st.randoms(use_true_random=False))
def test_merged_parts_say_what_the_whole_says(kind, parts, order):
    of = KINDS[kind]
    whole = report({"x": of([value for values in parts for value in values])})
    order.shuffle(parts)
    merged = report(merge({"x": of(values)} for values in parts))
    assert merged.keys() == whole.keys()
    assert merged == pytest.approx(whole, rel=1e-6, abs=1e-6)


def test_a_metric_that_only_some_parts_have_is_that_of_those():
    merged = merge([{"a": Mean(1, 2)}, {"b": Largest(3.0)}, {"a": Mean(5, 1), "b": Largest(2.0)}])
    assert merged == {"a": Mean(6, 3), "b": Largest(3.0)}
    assert report(merged) == {"a": 2.0, "b": 3.0}


def test_means_are_of_the_mask_alone():
    values = torch.where(MASK, draw(1.0).entropy_BT, math.nan)
    got = token_means({"x": values, "y": values > 1}, MASK)
    inside = values[MASK].tolist()
    assert got["x"].value == pytest.approx(fmean(inside))
    assert got["y"] == Mean(sum(value > 1 for value in inside), len(inside))
