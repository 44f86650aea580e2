import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms import LOSSES, WEIGHTED_LOSSES, build_loss, settings_of
from learner.algorithms.losses import entropy_losses, second_moment_bound, value_loss
from learner.algorithms.metrics import Mean, report
from learner.algorithms.samples import BatchRatios, Samples
from tests.builders_algorithms import MASK, Drawn, draw, in_rows, with_current
from tests.oracles import losses as oracles
from tests.oracles.tokens import Rows, nudged

Formula = Callable[[Rows], list[list[float]]]

CASES: dict[str, tuple[str, dict[str, float], Formula]] = {
    "ppo": ("ppo", {}, oracles.ppo),
    "ppo, clip higher": (
        "ppo", {"clip_ratio": 0.1, "clip_ratio_high": 0.3}, lambda rows: oracles.ppo(rows, low=0.1, high=0.3)
    ),
    "ppo, dual clip": ("ppo", {"dual_clip": 1.5}, lambda rows: oracles.ppo(rows, dual=1.5)),
    "decoupled ppo": ("decoupled_ppo", {}, oracles.decoupled_ppo),
    "decoupled ppo, dual clip": (
        "decoupled_ppo", {"clip_ratio": 0.1, "dual_clip": 2.0},
        lambda rows: oracles.decoupled_ppo(rows, low=0.1, dual=2.0),
    ),
    "gspo": ("gspo", {}, oracles.gspo),
    "gspo, wide": (
        "gspo", {"clip_ratio": 0.3, "clip_ratio_high": 0.4}, lambda rows: oracles.gspo(rows, low=0.3, high=0.4)
    ),
    "cispo": ("cispo", {}, oracles.cispo),
    "cispo, narrow": (
        "cispo", {"min_weight": 0.5, "max_weight": 1.2}, lambda rows: oracles.cispo(rows, least=0.5, most=1.2)
    ),
    "dppo": ("dppo", {}, oracles.dppo),
    "dppo, narrow": (
        "dppo", {"max_rise": 0.05, "max_fall": 0.1, "max_weight": 1.1},
        lambda rows: oracles.dppo(rows, rise=0.05, fall=0.1, most=1.1),
    ),
    "m2po": ("m2po", {}, oracles.m2po),
    "m2po, narrow": ("m2po", {"max_second_moment": 1e-3}, lambda rows: oracles.m2po(rows, threshold=1e-3)),
    "sapo": ("sapo", {}, oracles.sapo),
    "sapo, steep": (
        "sapo", {"tau_positive": 2.0, "tau_negative": 3.0}, lambda rows: oracles.sapo(rows, positive=2.0, negative=3.0)
    ),
    "reinforce": ("reinforce", {}, oracles.reinforce),
}  # fmt: skip

CHECKED = pytest.mark.parametrize("case", CASES)
SPREADS = pytest.mark.parametrize("spread", [0.0, 0.1, 1.0, 8.0])  # on-policy, slightly off, far off, absurd
POISON = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])


def losses_of(case: str, samples: Samples) -> Tensor:
    name, chosen, _ = CASES[case]
    return build_loss(name, chosen)(samples).losses_BT


def slopes(formula: Formula, rows: Rows, step: float = 1e-6) -> list[list[float]]:
    """Of the sum of the formula, by each token's current log-probability."""

    def total(nudge: tuple[int, int, float]) -> float:
        return math.fsum(loss for row in formula(nudged(rows, *nudge)) for loss in row)

    return [
        [(total((b, t, step)) - total((b, t, -step))) / (2 * step) for t in range(len(row))]
        for b, row in enumerate(rows)
    ]


def assert_close(got: list[list[float]], expected: list[list[float]], *, rel: float, abs: float) -> None:
    for got_row, expected_row in zip(got, expected, strict=True):
        assert got_row == pytest.approx(expected_row, rel=rel, abs=abs)


def test_every_loss_is_checked_against_a_formula():
    assert {name for name, _, _ in CASES.values()} == set(LOSSES)


@CHECKED
@SPREADS
@pytest.mark.parametrize("one_advantage", [True, False])
def test_a_loss_and_its_gradient_match_the_formula_written_as_loops(case, spread, one_advantage):
    drawn = draw(spread, one_advantage=one_advantage)
    current = drawn.samples.current_logprobs_BT.clone().requires_grad_()
    losses_BT = losses_of(case, with_current(drawn.samples, current))
    losses_BT.sum().backward()
    formula = CASES[case][2]
    assert_close(in_rows(losses_BT.detach(), MASK), formula(drawn.rows), rel=1e-9, abs=1e-12)
    scale = max(1.0, float(losses_BT.detach().abs().max()))
    assert_close(in_rows(current.grad, MASK), slopes(formula, drawn.rows), rel=1e-5, abs=1e-6 * scale)


@CHECKED
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.02, 0.3, 2.0]), mask=st.integers(0, 2**12 - 1))
def test_a_loss_matches_the_formula_whatever_the_mask(case, seed, spread, mask):
    mask_BT = torch.tensor([[bool(mask >> (4 * b + t) & 1) for t in range(4)] for b in range(3)])
    drawn = draw(spread, seed=seed, mask_BT=mask_BT)
    expected = CASES[case][2](drawn.rows)
    assert_close(in_rows(losses_of(case, drawn.samples), mask_BT), expected, rel=1e-9, abs=1e-12)


@CHECKED
@POISON
@pytest.mark.parametrize(
    "which",
    ["current_logprobs_BT", "proximal_logprobs_BT", "behavior_logprobs_BT", "advantages_BT", "weights_BT"],
)
def test_what_lies_outside_the_mask_never_moves_the_policy(case, which, poison):
    name, chosen, _ = CASES[case]

    def loss_and_gradient(samples: Samples) -> tuple[Tensor, Tensor, dict[str, float]]:
        current = samples.current_logprobs_BT.clone().requires_grad_()
        output = build_loss(name, chosen)(with_current(samples, current))
        output.losses_BT.sum().backward()
        return output.losses_BT.detach(), current.grad, report(output.metrics)

    clean = draw(0.5).samples
    dirty = replace(clean, **{which: torch.where(MASK, getattr(clean, which), poison)})
    losses_BT, gradient, metrics = loss_and_gradient(clean)
    poisoned_losses_BT, poisoned_gradient, poisoned_metrics = loss_and_gradient(dirty)
    assert torch.equal(poisoned_losses_BT, losses_BT)
    assert torch.equal(poisoned_gradient, gradient)
    assert poisoned_metrics == metrics
    assert not losses_BT[~MASK].any()
    assert not gradient[~MASK].any()


@CHECKED
def test_what_is_not_a_number_inside_the_mask_makes_a_loss_that_is_not_either(case):
    """So that it is noticed, whatever clips or masks there are."""
    clean = draw(0.1).samples
    evidence = "weights_BT" if CASES[case][0] in WEIGHTED_LOSSES else "behavior_logprobs_BT"
    for which in ("current_logprobs_BT", "advantages_BT", evidence):
        broken = getattr(clean, which).clone()
        broken[0, 2] = math.nan
        assert losses_of(case, replace(clean, **{which: broken})).isnan().any(), which


@CHECKED
def test_a_batch_without_a_token_costs_nothing(case):
    drawn = draw(0.5, mask_BT=torch.zeros_like(MASK))
    current = drawn.samples.current_logprobs_BT.clone().requires_grad_()
    name, chosen, _ = CASES[case]
    output = build_loss(name, chosen)(with_current(drawn.samples, current))
    output.losses_BT.sum().backward()
    assert not output.losses_BT.any()
    assert not current.grad.any()
    assert report(output.metrics) == {}


@CHECKED
def test_equal_rewards_teach_nothing(case):
    samples = draw(0.5).samples
    current = samples.current_logprobs_BT.clone().requires_grad_()
    nothing = torch.zeros_like(current)
    losses_of(case, replace(with_current(samples, current), advantages_BT=nothing)).sum().backward()
    assert not current.grad.any()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_weights_of_corrections_multiply_the_weighted_losses_and_no_other(name):
    samples = draw(0.3).samples
    one, twice = (LOSSES[name](replace(samples, weights_BT=weight * samples.weights_BT)).losses_BT for weight in (1, 2))
    assert torch.equal(twice, 2 * one if name in WEIGHTED_LOSSES else one)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_only_the_policy_being_trained_is_differentiated(name):
    samples = draw(0.1).samples
    tensors = {
        name: getattr(samples, name).clone().requires_grad_()
        for name in ("current_logprobs_BT", "weights_BT", "advantages_BT")
    }
    LOSSES[name](replace(samples, **tensors)).losses_BT.sum().backward()
    assert tensors["current_logprobs_BT"].grad.any()
    assert tensors["weights_BT"].grad is None


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_on_the_policy_that_sampled_every_loss_has_the_policy_gradient(name):
    """-A, whatever holds it elsewhere."""
    drawn = draw(0.0, one_advantage=True)
    current = drawn.samples.current_logprobs_BT.clone().requires_grad_()
    samples = replace(with_current(drawn.samples, current), weights_BT=torch.ones_like(current))
    LOSSES[name](samples).losses_BT.sum().backward()
    torch.testing.assert_close(current.grad, -drawn.samples.masked(samples.advantages_BT), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["ppo", "decoupled_ppo", "gspo"])
def test_a_token_that_moved_past_the_clip_in_the_direction_of_its_advantage_gets_no_gradient(name):
    output, gradient = four_tokens(name)
    assert (gradient != 0).tolist() == [[False], [True], [False], [True]]
    assert report(output.metrics) == {"clip_fraction": 0.5}


def four_tokens(name: str, by: float = 0.5, **chosen: float):
    """Trajectories of one token: out, back, out, back."""
    zero, mask = torch.zeros(4, 1), torch.ones(4, 1, dtype=torch.bool)
    current = torch.tensor([[by], [-by], [-by], [by]], requires_grad=True)
    samples = Samples(
        current_logprobs_BT=current, proximal_logprobs_BT=zero, behavior_logprobs_BT=zero,
        advantages_BT=torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]), weights_BT=torch.ones(4, 1), mask_BT=mask,
    )  # fmt: skip
    output = build_loss(name, chosen)(samples)
    output.losses_BT.sum().backward()
    return output, current.grad


def test_dual_clip_takes_the_gradient_of_punished_tokens_that_are_much_likelier():
    output, gradient = four_tokens("ppo", by=2.0, dual_clip=3.0)
    assert (gradient != 0).tolist() == [[False], [True], [False], [False]]
    assert report(output.metrics) == {"clip_fraction": 0.75}
    assert output.losses_BT[3].item() == 3.0


def test_no_token_loses_its_gradient_to_cispo():
    _, gradient = four_tokens("cispo", by=9.0, min_weight=0.1)
    assert gradient.flatten().tolist() == pytest.approx([-5.0, -0.1, 0.1, 5.0])


def test_with_one_advantage_per_trajectory_gspo_is_that_of_sequences():
    """In value and in slope, though only the token form is differentiated with parts held still."""
    drawn = draw(0.02, one_advantage=True)
    rows = [row for row in drawn.rows if row]
    wide = {"clip_ratio": 0.01, "clip_ratio_high": 0.02}
    current = drawn.samples.current_logprobs_BT.clone().requires_grad_()
    losses_BT = build_loss("gspo", wide)(with_current(drawn.samples, current)).losses_BT
    means = [math.fsum(row) / len(row) for row in in_rows(losses_BT.detach(), MASK) if row]
    assert means == pytest.approx(oracles.gspo_of_sequences(rows, low=0.01, high=0.02), rel=1e-12)
    losses_BT.sum().backward()
    step = 1e-6
    gradients = [row for row in in_rows(current.grad, MASK) if row]
    for b, row in enumerate(rows):
        for t in range(len(row)):
            moved = [
                [replace(o, current=o.current + sign * step * ((k, j) == (b, t))) for j, o in enumerate(each)]
                for sign in (1, -1)
                for k, each in enumerate(rows)
            ]
            up, down = moved[: len(rows)], moved[len(rows) :]
            slope = (
                oracles.gspo_of_sequences(up, low=0.01, high=0.02)[b]
                - oracles.gspo_of_sequences(down, low=0.01, high=0.02)[b]
            ) / (2 * step)
            assert gradients[b][t] == pytest.approx(slope * len(row), rel=1e-5, abs=1e-7)


@SPREADS
def test_the_clip_fraction_counts_what_moved_out(spread):
    drawn = draw(spread)
    for name, is_behavior, low, high in (("ppo", True, 0.2, 0.2), ("decoupled_ppo", False, 0.2, 0.28)):
        metric = LOSSES[name](drawn.samples).metrics["clip_fraction"]
        rows = [[o for o in row if o.advantage] for row in drawn.rows]
        counts = [oracles.clip_fraction(row, low=low, high=high, behavior=is_behavior) for row in rows]
        assert metric == Mean(sum(counts), int(MASK.sum()))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3, 3, width=32), st.sampled_from([-1.0, 0.0, 1.0])), max_size=12),
    st.sampled_from([1e-3, 0.04, 1.0]),
)
def test_m2po_leaves_out_no_more_than_it_must(tokens, most):
    """What goes on of the tokens that moved with their advantage is within the bound, and one more would not be."""
    log_ratios, advantages = (torch.tensor([token[i] for token in tokens], dtype=torch.float64) for i in (0, 1))
    bound = second_moment_bound(BatchRatios(log_ratios_M=log_ratios, advantages_M=advantages), most)
    moments = sorted(ratio**2 for ratio, advantage in tokens if ratio * advantage > 0)
    kept = [moment for moment in moments if moment < bound]
    assert not kept or sum(kept) / len(kept) <= most * (1 + 1e-12)
    if len(kept) < len(moments):
        with_ties = [moment for moment in moments if moment <= bound]
        assert sum(with_ties) / len(with_ties) > most * (1 - 1e-12)


def test_a_token_the_behavior_policy_all_but_never_samples_costs_no_more_than_e_to_the_20():
    behavior, mask = torch.tensor([[-1000.0]]), torch.ones(1, 1, dtype=torch.bool)
    current = torch.zeros(1, 1, requires_grad=True)
    samples = Samples(
        current_logprobs_BT=current, proximal_logprobs_BT=torch.zeros(1, 1), behavior_logprobs_BT=behavior,
        advantages_BT=torch.tensor([[-1.0]]), weights_BT=torch.ones(1, 1), mask_BT=mask,
    )  # fmt: skip
    loss = LOSSES["ppo"](samples).losses_BT.sum()
    loss.backward()
    assert loss.item() == pytest.approx(math.exp(20))
    assert current.grad.isfinite().all()


@SPREADS
def test_the_value_loss_matches_the_formula_written_as_loops(spread):
    samples = draw(spread).samples
    values, old, targets = samples.current_logprobs_BT, samples.proximal_logprobs_BT, samples.advantages_BT
    values = values.clone().requires_grad_()
    output = value_loss(values, old, targets, MASK, value_clip=0.3)
    rows = [in_rows(tensor.detach(), MASK) for tensor in (values, old, targets)]
    expected = [
        [oracles.value(*numbers, clip_to=0.3) for numbers in zip(*row, strict=True)] for row in zip(*rows, strict=True)
    ]
    assert_close(in_rows(output.losses_BT.detach(), MASK), expected, rel=1e-12, abs=1e-12)
    squares = [(value - target) ** 2 for row in zip(*rows, strict=True) for value, _, target in zip(*row, strict=True)]
    assert output.metrics["value_error_squared"].value == pytest.approx(sum(squares) / len(squares))
    assert torch.autograd.gradcheck(
        lambda values: value_loss(values, old, targets, MASK, value_clip=0.3).losses_BT.sum(), (values,)
    )


@POISON
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_lies_outside_the_mask_never_moves_the_critic(which, poison):
    samples = draw(0.5).samples

    def gradient(tensors: list[Tensor]) -> Tensor:
        values = tensors[0].clone().requires_grad_()
        value_loss(values, *tensors[1:], MASK).losses_BT.sum().backward()
        return values.grad

    clean = [samples.current_logprobs_BT, samples.proximal_logprobs_BT, samples.advantages_BT]
    dirty = [*clean]
    dirty[which] = torch.where(MASK, clean[which], poison)
    assert torch.equal(gradient(dirty), gradient(clean))


def test_the_entropy_bonus_rewards_each_nat_in_the_mask():
    entropy = torch.where(MASK, draw(0.1).entropy_BT, math.nan).requires_grad_()
    losses_BT = entropy_losses(entropy, MASK, coefficient=0.3)
    losses_BT.sum().backward()
    torch.testing.assert_close(losses_BT, torch.where(MASK, -0.3 * entropy, 0.0), equal_nan=False)
    torch.testing.assert_close(entropy.grad, -0.3 * MASK.double())


def test_an_unknown_algorithm_or_setting_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown loss trpo; known: cispo, decoupled_ppo, dppo, gspo, m2po, ppo, rein"):
        build_loss("trpo", {})
    with pytest.raises(ValueError, match="ppo has no setting clip; it takes: clip_ratio, clip_ratio_high, dual_clip"):
        build_loss("decoupled_ppo", {"clip": 0.1})


@pytest.mark.parametrize(
    ("name", "chosen", "sentence"),
    [
        ("ppo", {"clip_ratio": 1.5}, "clip_ratio of ppo must be >= 0 and <= 1, got 1.5"),
        ("ppo", {"dual_clip": 1.0}, "dual_clip of ppo must be > 1, got 1.0"),
        ("ppo", {"clip_ratio_high": math.nan}, "clip_ratio_high of ppo must be >= 0, got nan"),
        ("cispo", {"max_weight": 0.0}, "max_weight of cispo must be > 0, got 0.0"),
        ("m2po", {"max_second_moment": -1.0}, "max_second_moment of m2po must be > 0, got -1.0"),
    ],
)
def test_a_setting_out_of_bounds_is_refused_with_the_bounds(name, chosen, sentence):
    with pytest.raises(ValueError, match="must be") as refusal:
        build_loss(name, chosen)
    assert str(refusal.value) == sentence


def test_the_settings_of_a_loss_are_its_keywords_with_defaults():
    assert settings_of(LOSSES["ppo"]) == {"clip_ratio": 0.2, "clip_ratio_high": 0.2, "dual_clip": math.inf}
    assert settings_of(LOSSES["reinforce"]) == {}


def test_drawn_samples_are_of_every_kind():
    """Of what the tests above are made."""
    drawn: Drawn = draw(1.0)
    assert [len(row) for row in drawn.rows] == [5, 5, 4, 1, 0]
    assert any(o.current > o.behavior for row in drawn.rows for o in row)
    assert any(o.current < o.behavior for row in drawn.rows for o in row)
