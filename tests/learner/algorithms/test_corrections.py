import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.algorithms import CORRECTIONS, WEIGHINGS, build_corrections
from learner.algorithms.corrections import Correction, Evidence, apply_corrections
from learner.algorithms.metrics import report
from learner.algorithms.proximal import interpolated_logprobs
from tests.builders_algorithms import MASK, Drawn, draw, in_rows
from tests.oracles import corrections as oracles
from tests.oracles.corrections import Corrected
from tests.oracles.tokens import Row

CASES: dict[str, Callable[[Row], list[Corrected]]] = {
    "truncate_tokens": oracles.truncate_tokens,
    "truncate_tokens:max_weight=1.01": lambda row: oracles.truncate_tokens(row, max_weight=1.01),
    "truncate_sequences": oracles.truncate_sequences,
    "truncate_sequences:max_weight=1.5": lambda row: oracles.truncate_sequences(row, max_weight=1.5),
    "taper": oracles.taper,
    "taper:max_weight=1.2": lambda row: oracles.taper(row, max_weight=1.2),
    "unweighted": oracles.unweighted,
    "icepop": oracles.icepop,
    "icepop:low=0.9,high=1.2": lambda row: oracles.icepop(row, low=0.9, high=1.2),
    "geometric_mask": oracles.geometric_mask,
    "geometric_mask:low=0.8,high=1.5": lambda row: oracles.geometric_mask(row, low=0.8, high=1.5),
    "product_mask": oracles.product_mask,
    "product_mask:low=0.1,high=inf": lambda row: oracles.product_mask(row, low=0.1, high=math.inf),
    "veto": oracles.veto,
    "veto:min_ratio=0.5": lambda row: oracles.veto(row, min_ratio=0.5),
    "opsm": oracles.opsm,
    "opsm:max_kl=0.1": lambda row: oracles.opsm(row, max_kl=0.1),
}
SPREADS = pytest.mark.parametrize("spread", [0.0, 0.02, 0.3, 2.0, 15.0])


def applied(drawn: Drawn, *texts: str) -> Correction:
    return apply_corrections(build_corrections(texts, loss="decoupled_ppo"), drawn.evidence)


def expected_of(drawn: Drawn, *texts: str) -> tuple[list[list[float]], list[list[bool]]]:
    """(weights, what is left in): weights of the last that changes them, a token left in only if all leave it in."""
    weights, kept = [], []
    for row in drawn.rows:
        corrected = [CASES[text](row) if row else [] for text in texts]
        weighing = [
            each for text, each in zip(texts, corrected, strict=True) if text.partition(":")[0] in WEIGHINGS
        ] or [oracles.uncorrected(row)]
        weights.append([one.weight for one in weighing[-1]])
        kept.append([all(each[t].kept for each in corrected) for t in range(len(row))])
    return weights, kept


def assert_matches(got: Correction, mask_BT: torch.Tensor, weights: list[list[float]], kept: list[list[bool]]) -> None:
    assert in_rows(got.kept_BT, mask_BT) == kept
    assert not got.kept_BT[~mask_BT].any()
    for got_row, row in zip(in_rows(got.weights_BT, mask_BT), weights, strict=True):
        assert got_row == pytest.approx(row, rel=1e-9)


def test_every_correction_is_checked_against_a_formula():
    assert {text.partition(":")[0] for text in CASES} == set(CORRECTIONS)


@SPREADS
@pytest.mark.parametrize("text", CASES)
def test_a_correction_matches_the_formula_written_as_loops(text, spread):
    drawn = draw(spread)
    assert_matches(applied(drawn, text), MASK, *expected_of(drawn, text))


@pytest.mark.parametrize("text", CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.02, 0.3, 2.0]), mask=st.integers(0, 2**12 - 1))
def test_a_correction_matches_the_formula_whatever_the_mask(text, seed, spread, mask):
    mask_BT = torch.tensor([[bool(mask >> (4 * b + t) & 1) for t in range(4)] for b in range(3)])
    drawn = draw(spread, seed=seed, mask_BT=mask_BT)
    assert_matches(applied(drawn, text), mask_BT, *expected_of(drawn, text))


@SPREADS
@pytest.mark.parametrize(
    "texts",
    [
        (),
        ("icepop", "truncate_tokens:max_weight=1.01"),
        ("geometric_mask:low=0.8,high=1.5", "veto:min_ratio=0.5", "opsm"),
        ("unweighted", "product_mask", "icepop:low=0.9,high=1.2"),
    ],
)
def test_corrections_compose(texts, spread):
    drawn = draw(spread)
    assert_matches(applied(drawn, *texts), MASK, *expected_of(drawn, *texts))


def test_masks_judge_the_evidence_and_not_each_other_so_their_order_does_not_matter():
    drawn = draw(0.5)
    texts = ["icepop:low=0.9,high=1.2", "geometric_mask:low=0.8,high=1.5", "truncate_tokens", "opsm"]
    one, other = applied(drawn, *texts), applied(drawn, *reversed(texts))
    assert torch.equal(one.kept_BT, other.kept_BT)
    assert torch.equal(one.weights_BT, other.weights_BT)
    assert 0 < one.kept_BT.sum() < MASK.sum()


def test_each_correction_says_what_it_left_out_and_all_together_what_they_did():
    drawn = draw(0.5)
    texts = ("icepop:low=0.9,high=1.2", "veto:min_ratio=0.5", "truncate_tokens:max_weight=1.01")
    got = report(applied(drawn, *texts).metrics)
    num_tokens = sum(len(row) for row in drawn.rows)

    def share(kept: list[list[bool]]) -> float:
        return 1 - sum(sum(row) for row in kept) / num_tokens

    assert got == pytest.approx(
        {
            "icepop_masked": share(expected_of(drawn, texts[0])[1]),
            "veto_masked": share(expected_of(drawn, texts[1])[1]),
            "truncate_tokens_truncated": sum(oracles.rho(o) > 1.01 for row in drawn.rows for o in row) / num_tokens,
            "masked_fraction": share(expected_of(drawn, *texts)[1]),
        }
    )


def test_on_policy_nothing_is_left_out_and_nothing_weighted():
    got = applied(draw(0.0), *(name for name in CORRECTIONS))
    assert torch.equal(got.kept_BT, MASK)
    assert torch.equal(got.weights_BT[MASK], torch.ones(int(MASK.sum()), dtype=torch.float64))
    assert not any(report(got.metrics).values())


@pytest.mark.parametrize("name", sorted(CORRECTIONS.keys() - {"unweighted"}))
def test_what_is_not_a_number_is_not_corrected_away_but_left_to_be_noticed(name):
    evidence = draw(0.0).evidence
    broken = evidence.log_ratio_BT.clone()
    broken[0, 2] = math.nan
    got = apply_corrections(build_corrections([name], loss="reinforce"), replace(evidence, log_ratio_BT=broken))
    assert got.kept_BT[0, 2]
    assert got.weights_BT[0, 2].isnan()


def test_a_token_whose_ratio_cannot_be_held_by_a_float_still_has_a_finite_weight():
    drawn = draw(0.1)
    samples = replace(drawn.samples, behavior_logprobs_BT=torch.full(MASK.shape, -1000.0, dtype=torch.float64))
    correction = apply_corrections({}, replace(drawn, samples=samples).evidence)
    assert correction.weights_BT[MASK].tolist() == pytest.approx([math.exp(20)] * int(MASK.sum()))


def test_praise_brings_back_what_the_policy_lost_and_blame_ends_when_what_it_is_about_is_gone():
    log_ratio_BT = torch.tensor([[-6.0, 3.0], [-6.0, 3.0]])
    advantages_BT = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    evidence = Evidence(log_ratio_BT=log_ratio_BT, advantages_BT=advantages_BT, mask_BT=torch.ones(2, 2).bool())
    got = apply_corrections(build_corrections(["taper"], loss="reinforce"), evidence)
    assert got.weights_BT.flatten().tolist() == pytest.approx([1.0, 1.0, math.exp(-6), 1.0])


def test_one_token_that_the_policy_would_never_sample_takes_its_whole_trajectory_along():
    log_ratio_BT = torch.tensor([[0.0, math.log(0.9e-4), 0.0, 0.0], [0.0, math.log(1.1e-4), 0.0, 0.0]])
    mask_BT = torch.tensor([[False, True, True, True]] * 2)
    evidence = Evidence(log_ratio_BT=log_ratio_BT, advantages_BT=torch.ones(2, 4), mask_BT=mask_BT)
    got = apply_corrections(build_corrections(["veto"], loss="ppo"), evidence)
    assert got.kept_BT.tolist() == [[False] * 4, [False, True, True, True]]


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["tis"], "unknown correction tis; known: geometric_mask, icepop, opsm, product_mask, taper, truncate"),
        (["icepop:min=1"], "icepop has no setting min; it takes: low, high"),
        (["icepop:low=2"], "low of icepop must be >= 0 and <= 1, got 2.0"),
        (["icepop:high=nan"], "high of icepop must be >= 1, got nan"),
        (["truncate_tokens:max_weight=0"], "max_weight of truncate_tokens must be > 0, got 0.0"),
        (["icepop:low"], "expected NAME or NAME:SETTING=NUMBER,SETTING=NUMBER, got 'icepop:low'"),
        (["icepop:low=a"], "expected NAME or NAME:SETTING=NUMBER,SETTING=NUMBER, got 'icepop:low=a'"),
        (["unweighted:low=1"], "unweighted has no setting low; it takes: none"),
        (["veto", "icepop", "veto:min_ratio=0.1"], "correction veto is given twice"),
    ],
)
def test_a_correction_that_makes_no_sense_is_refused_with_a_sentence(texts, sentence):
    with pytest.raises(ValueError, match=r"unknown|no setting|must be|expected|twice") as refusal:
        build_corrections(texts, loss="decoupled_ppo")
    assert str(refusal.value).startswith(sentence)


@pytest.mark.parametrize("name", sorted(WEIGHINGS))
def test_weights_are_refused_where_the_loss_has_none(name):
    with pytest.raises(ValueError, match=f"correction {name} changes weights, and loss ppo has none"):
        build_corrections([name], loss="ppo")
    assert set(build_corrections([name], loss="reinforce")) == {name}


@pytest.mark.parametrize(("max_staleness", "expected"), [(0, {"truncate_tokens"}), (1, {"taper"}), (8, {"taper"})])
def test_without_a_word_weights_are_bounded_where_there_are_weights(max_staleness, expected):
    assert set(build_corrections(None, loss="decoupled_ppo", max_staleness=max_staleness)) == expected
    assert set(build_corrections(None, loss="reinforce", max_staleness=max_staleness)) == expected
    assert build_corrections(None, loss="ppo", max_staleness=max_staleness) == {}
    assert build_corrections([], loss="decoupled_ppo") == {}


def test_settings_may_be_written_with_hyphens_and_spaces():
    [correct] = build_corrections([" icepop: low = 0.25 , high=2"], loss="ppo").values()
    assert correct.keywords == {"low": 0.25, "high": 2.0}


@SPREADS
def test_the_interpolated_proximal_policy_matches_the_formula_written_as_loops(spread):
    drawn = draw(spread)
    current = drawn.samples.current_logprobs_BT.clone().requires_grad_()
    got = interpolated_logprobs(current, drawn.samples.behavior_logprobs_BT, drawn.staleness_BT)
    assert not got.requires_grad
    expected = [[oracles.interpolated(o) for o in row] for row in drawn.rows]
    for got_row, row in zip(in_rows(got, MASK), expected, strict=True):
        assert got_row == pytest.approx(row, rel=1e-12, abs=1e-12)


def test_a_token_one_step_old_was_sampled_by_its_proximal_policy_and_a_fresh_one_by_the_current():
    current, behavior = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-2.0, -2.0, -5.0]])
    got = interpolated_logprobs(current, behavior, torch.tensor([[0, 1, 4]], dtype=torch.int32))
    assert got.tolist() == [[-1.0, -2.0, -2.0]]
