import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.kl import adapted_coefficient, kl_estimates, kl_loss, kl_metrics
from tests import oracles_advantages as oracles

MASK = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]], dtype=torch.bool)
ESTIMATORS = ("k1", "k2", "k3")


def some_logprobs(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(policy, reference) [B, T], float64"""
    generator = torch.Generator().manual_seed(0)
    reference, noise = (torch.randn(MASK.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return reference + spread * noise, reference


def expected(policy: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    out = torch.zeros_like(policy)
    for b, t in MASK.nonzero().tolist():
        out[b, t] = oracles.kl(float(policy[b, t]), float(reference[b, t]), estimator)
    return out


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_estimate_matches_the_formula_written_as_loops(estimator, spread):
    policy, reference = some_logprobs(spread)
    got = kl_estimates(policy, reference, MASK, estimator=estimator)
    torch.testing.assert_close(got, expected(policy, reference, estimator), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_loss_is_the_mean_estimate_and_its_gradient_the_slope(estimator, spread):
    policy, reference = some_logprobs(spread)

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        return kl_loss(logprobs, reference, MASK, num_loss_tokens=7, coefficient=0.3, estimator=estimator).loss

    assert float(loss_of(policy)) == pytest.approx(0.3 * float(expected(policy, reference, estimator).sum()) / 7)
    assert torch.autograd.gradcheck(loss_of, (policy.clone().requires_grad_(),))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_what_lies_outside_the_mask_costs_nothing(estimator, which, poison):
    def loss_and_gradient(policy: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        policy = policy.clone().requires_grad_()
        output = kl_loss(policy, reference, MASK, num_loss_tokens=4, coefficient=1.0, estimator=estimator)
        output.loss.backward()
        return output.loss.detach(), policy.grad

    clean, dirty = [*some_logprobs(0.5)], [*some_logprobs(0.5)]
    dirty[which] = torch.where(MASK, clean[which], poison)
    for one, other in zip(loss_and_gradient(*clean), loss_and_gradient(*dirty), strict=True):
        assert torch.equal(one, other)
    assert kl_metrics(*clean, MASK) == kl_metrics(*dirty, MASK)


def exact_gradients() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits, log pi, log ref, gradient of the exact KL) of a policy over 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    [gradient] = torch.autograd.grad(kl, logits, retain_graph=True)
    return logits, policy, reference, gradient


def test_on_average_k2_in_the_loss_has_the_gradient_of_the_kl_and_k1_none_at_all():
    """Over all tokens, each as often as the policy samples it."""
    logits, policy, reference, gradient = exact_gradients()
    weights = policy.detach().exp()
    mask = torch.ones(1, 5, dtype=torch.bool)
    for estimator, expected_gradient in [("k2", gradient), ("k1", torch.zeros(5, dtype=torch.float64))]:
        estimates = kl_estimates(policy.unsqueeze(0), reference.unsqueeze(0), mask, estimator=estimator)[0]
        [got] = torch.autograd.grad((weights * estimates).sum(), logits, retain_graph=True)
        torch.testing.assert_close(got, expected_gradient, rtol=0, atol=1e-12)


def test_on_average_k1_in_the_reward_has_the_gradient_of_the_kl():
    logits, policy, reference, gradient = exact_gradients()
    mask = torch.ones(1, 5, dtype=torch.bool)
    cost = kl_estimates(policy.detach().unsqueeze(0), reference.unsqueeze(0), mask, estimator="k1")[0]
    [got] = torch.autograd.grad((policy.detach().exp() * policy * cost).sum(), logits)
    torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_on_average_k1_and_k3_are_the_kl(estimator):
    _, policy, reference, _ = exact_gradients()
    estimates = kl_estimates(
        policy.unsqueeze(0), reference.unsqueeze(0), torch.ones(1, 5, dtype=torch.bool), estimator=estimator
    )[0]
    kl = (policy.exp() * (policy - reference)).sum()
    torch.testing.assert_close((policy.exp() * estimates).sum(), kl, rtol=0, atol=1e-12)


def test_policies_without_a_token_in_common_are_far_apart_and_not_infinitely():
    one = torch.ones(1, 1, dtype=torch.bool)
    for reference in (-math.inf, 0.0):
        policy = torch.tensor([[-200.0 if reference == 0 else 0.0]], requires_grad=True)
        output = kl_loss(policy, torch.tensor([[reference]]), one, num_loss_tokens=1, coefficient=1.0, estimator="k3")
        output.loss.backward()
        assert output.loss.isfinite()
        assert policy.grad.isfinite().all()


def test_k1_in_the_loss_and_an_unknown_estimator_are_refused():
    policy, reference = some_logprobs(0.1)
    with pytest.raises(ValueError, match="the gradient of k1 does not depend on the reference"):
        kl_loss(policy, reference, MASK, num_loss_tokens=4, coefficient=1.0, estimator="k1")
    with pytest.raises(ValueError, match="unknown KL estimator k4; known: k1, k2, k3"):
        kl_estimates(policy, reference, MASK, estimator="k4")


@given(st.floats(1e-6, 10), st.lists(st.floats(-100, 1000), max_size=20), st.floats(0.01, 100))
def test_the_coefficient_adapts_as_the_formula_written_as_a_loop(start, kls, target):
    coefficients, coefficient = [], start
    for kl in kls:
        coefficient = adapted_coefficient(coefficient, kl, target=target)
        coefficients.append(coefficient)
    assert coefficients == pytest.approx(oracles.ziegler(start, kls, target), rel=1e-9)


def test_the_coefficient_rises_above_the_target_falls_below_it_and_stays_at_it():
    assert adapted_coefficient(1.0, 6.6, target=6.0) == pytest.approx(1.01)
    assert adapted_coefficient(1.0, 600.0, target=6.0) == pytest.approx(1.02)
    assert adapted_coefficient(1.0, 6.0, target=6.0) == 1.0
    assert adapted_coefficient(1.0, -1.0, target=6.0) == pytest.approx(0.98)


def test_held_against_it_often_enough_a_distance_settles_at_the_target():
    """A policy whose distance is halved by twice the coefficient."""
    coefficient = 0.01
    for _ in range(2000):
        coefficient = adapted_coefficient(coefficient, 3.0 / coefficient, target=6.0)
    assert coefficient == pytest.approx(0.5, rel=1e-3)
