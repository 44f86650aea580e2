import math

import pytest
import torch
from torch import Tensor

from learner.algorithms import LOSSES, build_loss, settings_of
from learner.algorithms.losses import decoupled_ppo_loss, ppo_loss, value_loss
from tests import oracles

TOKENS = 17  # of the global batch; more than this micro-batch holds


def a_mask() -> Tensor:
    """Prompt, sampled, environment and padding tokens."""
    return torch.tensor(
        [[0, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool
    )


def some_logprobs(spread: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """current, proximal, behavior and advantages, [B, T] float64; `spread` is how far the policies are apart."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(a_mask().shape, generator=generator, dtype=torch.float64)

    behavior = -noise().abs()
    proximal = behavior + spread * noise()
    return proximal + spread * noise(), proximal, behavior, noise()


SPREADS = pytest.mark.parametrize("spread", [0.0, 0.1, 3.0])  # on-policy, slightly off, far off
POISON = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])


@SPREADS
def test_the_decoupled_loss_matches_the_formula_written_as_loops(spread):
    policies = some_logprobs(spread)
    got = decoupled_ppo_loss(
        *policies, a_mask(), num_loss_tokens=TOKENS, clip_ratio=0.1, clip_ratio_high=0.3, max_behavior_weight=1.5
    )
    rows = [tensor.tolist() for tensor in policies]
    expected = oracles.decoupled_ppo(*rows, a_mask().tolist(), tokens=TOKENS, low=0.1, high=0.3, largest_weight=1.5)
    assert float(got.loss) == pytest.approx(expected, abs=1e-12)
    metrics = oracles.decoupled_ppo_metrics(*rows, a_mask().tolist(), low=0.1, high=0.3, largest_weight=1.5)
    assert got.metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@SPREADS
def test_the_ppo_loss_matches_the_formula_written_as_loops(spread):
    current, proximal, behavior, advantages = some_logprobs(spread)
    got = ppo_loss(
        current, proximal, behavior, advantages, a_mask(), num_loss_tokens=TOKENS, clip_ratio=0.1, clip_ratio_high=0.3
    )
    rows = [tensor.tolist() for tensor in (current, behavior, advantages, a_mask())]
    assert float(got.loss) == pytest.approx(oracles.ppo(*rows, tokens=TOKENS, low=0.1, high=0.3), abs=1e-12)


@SPREADS
def test_the_value_loss_matches_the_formula_written_as_loops(spread):
    values, old_values, returns, _ = some_logprobs(spread)
    got = value_loss(values, old_values, returns, a_mask(), num_loss_tokens=TOKENS, value_clip=0.3)
    rows = [tensor.tolist() for tensor in (values, old_values, returns, a_mask())]
    assert float(got.loss) == pytest.approx(oracles.value(*rows, tokens=TOKENS, clip=0.3), abs=1e-12)


@SPREADS
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_gradient_of_a_loss_is_the_slope_of_its_value(name, spread):
    *policies, advantages = some_logprobs(spread)
    current, proximal, behavior = policies
    if spread == 0.0:
        current = current + 0.01  # at ratio 1 of plain PPO's min() both branches are equal, and so is their slope

    def loss_of(logprobs: Tensor) -> Tensor:
        return LOSSES[name](logprobs, proximal, behavior, advantages, a_mask(), num_loss_tokens=TOKENS).loss

    assert torch.autograd.gradcheck(loss_of, (current.clone().requires_grad_(),))


def test_the_behavior_weight_scales_the_step_and_is_not_differentiated():
    current, proximal, behavior, advantages = (tensor.requires_grad_() for tensor in some_logprobs(0.1))
    loss = decoupled_ppo_loss(current, proximal, behavior, advantages, a_mask(), num_loss_tokens=1).loss
    loss.backward()
    assert behavior.grad is None


def test_the_decoupled_loss_with_one_policy_for_both_is_ppo():
    current, _, behavior, advantages = some_logprobs(0.5)
    arguments = (current, behavior, behavior, advantages, a_mask())
    plain = ppo_loss(*arguments, num_loss_tokens=TOKENS, clip_ratio_high=0.28)
    assert torch.equal(decoupled_ppo_loss(*arguments, num_loss_tokens=TOKENS).loss, plain.loss)


@POISON
@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_what_lies_outside_the_mask_never_moves_the_policy(name, which, poison):
    def loss_and_gradient(tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        current, *others = tensors
        current = current.clone().requires_grad_()
        output = LOSSES[name](current, *others, a_mask(), num_loss_tokens=TOKENS)
        output.loss.backward()
        assert all(math.isfinite(value) for value in output.metrics.values())
        return output.loss.detach(), current.grad

    clean = [*some_logprobs(0.5)]
    dirty = [*clean]
    dirty[which] = torch.where(a_mask(), clean[which], poison)
    loss, gradient = loss_and_gradient(clean)
    poisoned_loss, poisoned_gradient = loss_and_gradient(dirty)
    assert torch.equal(poisoned_loss, loss)
    assert torch.equal(poisoned_gradient, gradient)
    assert not gradient[~a_mask()].any()


@POISON
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_lies_outside_the_mask_never_moves_the_critic(which, poison):
    def gradient(tensors: list[Tensor]) -> Tensor:
        values = tensors[0].clone().requires_grad_()
        value_loss(values, *tensors[1:], a_mask(), num_loss_tokens=TOKENS).loss.backward()
        return values.grad

    clean = [*some_logprobs(0.5)[:3]]
    dirty = [*clean]
    dirty[which] = torch.where(a_mask(), clean[which], poison)
    assert torch.equal(gradient(dirty), gradient(clean))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_token_that_moved_past_the_clip_in_the_direction_of_its_advantage_gets_no_gradient(name):
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    current = torch.tensor([[0.5, -0.5, -0.5, 0.5]], requires_grad=True)  # out, back, out, back
    zero, mask = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    output = LOSSES[name](current, zero, zero, advantages, mask, num_loss_tokens=4)
    output.loss.backward()
    assert (current.grad != 0).tolist() == [[False, True, False, True]]
    assert output.metrics["clip_fraction"] == 2


def test_a_token_the_behavior_policy_hardly_knew_is_not_blown_up():
    behavior, zero, mask = torch.tensor([[-50.0]]), torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    output = decoupled_ppo_loss(zero, zero, behavior, torch.ones(1, 1), mask, num_loss_tokens=1)
    assert float(output.loss) == -2.0
    assert output.metrics["behavior_weight_truncated"] == 1


def test_an_unknown_algorithm_or_setting_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown loss trpo; known: decoupled_ppo, ppo"):
        build_loss("trpo", {})
    with pytest.raises(
        ValueError, match="ppo has no setting clip; it takes: clip_ratio, clip_ratio_high, max_behavior_weight"
    ):
        build_loss("decoupled_ppo", {"clip": 0.1})


def test_the_settings_of_a_loss_are_its_keywords_with_defaults():
    assert settings_of(ppo_loss) == {"clip_ratio": 0.2, "clip_ratio_high": 0.2}
