"""What share each token has, and that no cut of the batch into micro-batches changes loss, gradient or metrics."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.algorithms import AGGREGATIONS, LOSSES, build_aggregation, build_corrections
from learner.algorithms.aggregation import BatchCounts, aggregate
from learner.algorithms.corrections import Evidence, apply_corrections
from learner.algorithms.health import policy_health, weight_health
from learner.algorithms.metrics import Metric, merge, report
from learner.algorithms.samples import Samples, bounded_log_ratio
from tests.builders_algorithms import MASK, Drawn, draw, in_rows, part, with_current
from tests.oracles import losses as oracles

FORMULAS = {
    "token_mean": lambda losses, counts: oracles.token_mean(losses, tokens=counts.tokens),
    "sequence_mean": lambda losses, counts: oracles.sequence_mean(losses, trajectories=counts.trajectories),
    "constant_length": lambda losses, counts: oracles.constant_length(
        losses, trajectories=counts.trajectories, longest=counts.max_new_tokens
    ),
}
CUTS = [[[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]], [[4, 2], [0, 3, 1]], [[3, 4], [2], [0, 1]]]
ALL_CORRECTIONS = ("truncate_tokens:max_weight=1.5", "icepop:low=0.7,high=1.4", "opsm", "veto:min_ratio=0.2")


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
@settings(max_examples=50, deadline=None)
@given(
    mask=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4),
    tokens=st.integers(1, 50),
    trajectories=st.integers(1, 9),
)
def test_an_aggregation_matches_the_formula_written_as_loops(name, mask, tokens, trajectories):
    mask_BT = torch.tensor(mask)
    losses_BT = torch.randn(mask_BT.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = BatchCounts(tokens=tokens, trajectories=trajectories, max_new_tokens=7)
    poisoned_BT = torch.where(mask_BT, losses_BT, math.nan)
    got = aggregate(poisoned_BT, AGGREGATIONS[name](mask_BT, counts))
    assert got.item() == pytest.approx(FORMULAS[name](in_rows(losses_BT, mask_BT), counts), rel=1e-12, abs=1e-15)


def test_every_aggregation_is_checked_against_a_formula():
    assert set(FORMULAS) == set(AGGREGATIONS)


@pytest.mark.parametrize("name", sorted(AGGREGATIONS))
def test_what_corrections_leave_out_keeps_its_share(name):
    """Otherwise a batch that is almost all left out would take a step as large as one that is trusted."""
    counts = draw(0.1).counts
    shares_BT = AGGREGATIONS[name](MASK, counts)
    ones = MASK.double()
    without_row_0 = torch.where(torch.arange(len(MASK)).unsqueeze(1) == 0, 0.0, ones)
    lost = aggregate(ones, shares_BT) - aggregate(without_row_0, shares_BT)
    assert lost.item() == pytest.approx(shares_BT[0].sum().item())
    assert lost > 0


@pytest.mark.parametrize("counts", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_shares_of_nothing_are_refused(counts):
    with pytest.raises(ValueError, match="shares of nothing"):
        BatchCounts(tokens=counts[0], trajectories=counts[1], max_new_tokens=counts[2])


def test_an_unknown_aggregation_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown aggregation sum; known: constant_length, sequence_mean, token_mean"):
        build_aggregation("sum")


def objective(samples: Samples, drawn: Drawn, rows: list[int], loss: str, aggregation: str) -> tuple[Tensor, dict]:
    """(part of the loss, metrics) of a micro-batch of these trajectories, as an engine composes them."""
    evidence = Evidence(
        log_ratio_BT=bounded_log_ratio(samples.proximal_logprobs_BT, samples.behavior_logprobs_BT, samples.mask_BT),
        advantages_BT=samples.masked(samples.advantages_BT),
        mask_BT=samples.mask_BT,
    )
    chosen = [
        text for text in ALL_CORRECTIONS if not text.startswith("truncate") or loss in ("decoupled_ppo", "reinforce")
    ]
    correction = apply_corrections(build_corrections(chosen, loss=loss), evidence)
    corrected = replace(samples, weights_BT=correction.weights_BT, mask_BT=correction.kept_BT)
    output = LOSSES[loss](corrected)
    metrics: dict[str, Metric] = policy_health(
        samples.current_logprobs_BT,
        samples.behavior_logprobs_BT,
        drawn.entropy_BT[rows],
        drawn.staleness_BT[rows],
        samples.mask_BT,
    )
    metrics |= weight_health(correction.weights_BT, correction.kept_BT, samples.mask_BT)
    metrics |= {**correction.metrics, **output.metrics}
    return aggregate(output.losses_BT, AGGREGATIONS[aggregation](samples.mask_BT, drawn.counts)), metrics


@pytest.mark.parametrize("aggregation", sorted(AGGREGATIONS))
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_no_cut_into_micro_batches_changes_loss_gradient_or_metrics(loss, aggregation):
    """In float32, corrected by everything there is; the metrics as merged from the parts."""
    drawn = draw(0.3, dtype=torch.float32)
    seen = []
    for cut in CUTS:
        current = drawn.samples.current_logprobs_BT.clone().requires_grad_()
        samples = with_current(drawn.samples, current)
        outputs = [objective(part(samples, rows), drawn, rows, loss, aggregation) for rows in cut]
        total = torch.stack([part_of_loss for part_of_loss, _ in outputs]).sum()
        total.backward()
        seen.append((total.detach(), current.grad, report(merge(metrics for _, metrics in outputs))))
    assert seen[0][1].abs().max() > 1e-3
    for total, gradient, metrics in seen[1:]:
        torch.testing.assert_close(total, seen[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, seen[0][1], rtol=0, atol=1e-6)
        assert metrics == pytest.approx(seen[0][2], rel=1e-6, abs=1e-9)
