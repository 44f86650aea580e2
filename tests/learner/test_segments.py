"""Rows in which a prompt stands once: what is said of a trajectory is what is said of it alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GraniteForCausalLM

from learner.deepspeed_engine import compute_activations_twice
from learner.networks import CriticNetwork, PolicyNetwork
from learner.packing import Arrangement
from learner.segments import let_rows_be_segmented, segmented_inputs
from learner.taking import take
from tests.models import VOCAB_SIZE, a_model, a_tiny_model

SHAPES: dict[str, Sequence[tuple[int, Sequence[int]]]] = {  # prompts of groups, and answers to each
    "a prompt longer than its answers": [(30, (3, 5, 1, 4))],
    "answers longer than their prompt": [(3, (30, 17, 45, 21))],
    "several groups, prompts of several lengths": [(6, (5, 7)), (40, (4, 90)), (9, (2, 2, 70)), (70, (80, 3))],
    "an answer of no token": [(12, (0, 3, 0))],
    "a prompt of no token": [(0, (4, 9, 2)), (10, (3, 3))],
    "a group of one": [(5, (6,)), (8, (3, 2)), (4, (30,))],
    "long ones of unlike lengths": [(20, (300, 40, 90)), (200, (10, 50, 33))],
}


def padded(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    lengths_B = torch.tensor([len(row) for row in rows])
    mask_BT = torch.arange(int(lengths_B.max())) < lengths_B.unsqueeze(1)
    ids_BT = torch.zeros(mask_BT.shape, dtype=torch.int64)
    ids_BT[mask_BT] = torch.from_numpy(np.concatenate(rows)).long()
    return ids_BT, mask_BT


def a_micro_batch(shape: Sequence[tuple[int, Sequence[int]]], seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    rows = []
    for prompt_length, answers in shape:
        prompt = rng.integers(5, VOCAB_SIZE, prompt_length)
        rows += [np.concatenate([prompt, rng.integers(5, VOCAB_SIZE, length)]) for length in answers]
    return padded(rows)


def a_policy(**how: Any) -> PolicyNetwork:
    let_rows_be_segmented()
    model = a_model(0, tied=True, num_attention_heads=4, num_key_value_heads=2).double()
    return PolicyNetwork(model, temperature=0.7, trains_entropy=True, **how)


def said_and_gradients(network: PolicyNetwork, inputs: Sequence[Tensor], *, shares: bool) -> list[Tensor]:
    """Of a loss in which every trajectory counts differently."""
    network.arrangement = Arrangement(shares=shares)
    network.zero_grad()
    said = [each_BT.where(inputs[1], 0.0) for each_BT in network(*inputs)]
    counts_B1 = torch.arange(1, len(inputs[0]) + 1).unsqueeze(1)
    sum((each_BT.square() * counts_B1).sum() for each_BT in said).backward()
    return [*(each_BT.detach() for each_BT in said), *(each.grad.clone() for each in network.parameters())]


def assert_same_by_sharing(network: PolicyNetwork, inputs: Sequence[Tensor]) -> None:
    assert segmented_inputs(*inputs[:2]) is not None
    once, repeated = (said_and_gradients(network, inputs, shares=shares) for shares in (True, False))
    for one, other in zip(once, repeated, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_probabilities_entropies_values_and_gradients_are_those_of_prompts_that_are_repeated(shape):
    network = a_policy(has_value_head=True)
    torch.nn.init.normal_(network.value_head.weight, generator=torch.Generator().manual_seed(0))
    ids_BT, mask_BT = a_micro_batch(shape)
    assert_same_by_sharing(network, (ids_BT, mask_BT, mask_BT))


@pytest.mark.parametrize("seed", range(10))
def test_micro_batches_of_random_shapes_are_computed_as_repeated_ones(seed):
    rng = np.random.default_rng(seed)
    shape = [(int(rng.integers(1, 40)), rng.integers(0, 40, rng.integers(2, 6)).tolist()) for _ in range(3)]
    ids_BT, mask_BT = a_micro_batch(shape, seed)
    assert_same_by_sharing(a_policy(), (ids_BT, mask_BT, mask_BT & torch.from_numpy(rng.random(mask_BT.shape) < 0.5)))


def test_a_model_that_changes_its_logits_is_computed_as_with_repeated_prompts():
    let_rows_be_segmented()
    model = a_model(0, tied=True, kind=GraniteForCausalLM).double()
    model.config.logits_scaling = 2.0
    network = PolicyNetwork(model, temperature=1.0, trains_entropy=True)
    assert network._changes_logits
    ids_BT, mask_BT = a_micro_batch(SHAPES["a prompt longer than its answers"])
    assert_same_by_sharing(network, (ids_BT, mask_BT, mask_BT))


def test_activations_may_be_computed_twice():
    network = a_policy()
    compute_activations_twice(network.model)
    ids_BT, mask_BT = a_micro_batch(SHAPES["several groups, prompts of several lengths"])
    assert_same_by_sharing(network, (ids_BT, mask_BT, mask_BT))


@torch.no_grad()
def test_a_critic_says_the_same_values_also_after_the_last_token():
    let_rows_be_segmented()
    critic = CriticNetwork(a_tiny_model(0, tied=True).model.double())
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    ids_BT, mask_BT = a_micro_batch(SHAPES["several groups, prompts of several lengths"])
    ids_BS, mask_BS = (torch.nn.functional.pad(each, (0, 1)) for each in (ids_BT, mask_BT))
    repeated_BS = critic(ids_BS, mask_BS)
    critic.arrangement = Arrangement(shares=True)
    asked_BS = torch.nn.functional.pad(mask_BT, (1, 0), value=True)
    torch.testing.assert_close(critic(ids_BS, mask_BS)[asked_BS], repeated_BS[asked_BS], rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_what_one_answer_says_does_not_leak_into_another():
    network = a_policy()
    network.arrangement = Arrangement(shares=True)
    ids_BT, mask_BT = a_micro_batch([(10, (8, 8, 8))])
    before_BT, _ = network(ids_BT, mask_BT, mask_BT)
    changed_BT = ids_BT.clone()
    changed_BT[1, 10:] = ids_BT[1, 10:].flip(0)
    after_BT, _ = network(changed_BT, mask_BT, mask_BT)
    assert torch.equal(after_BT[[0, 2]], before_BT[[0, 2]])
    assert not torch.equal(after_BT[1], before_BT[1])


def test_a_prompt_is_computed_once_and_no_mask_is_as_large_as_the_row_squared():
    ids_BT, mask_BT = a_micro_batch([(50, (10, 12, 5, 7)), (30, (4, 20))])
    inputs, places_BT = segmented_inputs(ids_BT, mask_BT)
    assert inputs["input_ids"].shape == (1, 50 + 34 + 30 + 24)
    assert torch.equal(inputs["input_ids"][0, places_BT[mask_BT]], ids_BT[mask_BT])
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    assert torch.equal(inputs["position_ids"][0, places_BT[mask_BT]], positions_BT[mask_BT])
    masks = [call.sees.numel() for call in inputs["segmented"].calls if call.sees is not None]
    assert inputs["attention_mask"].numel() == 1
    assert sum(masks) < 0.5 * inputs["input_ids"].numel() ** 2


def test_long_answers_to_one_prompt_have_one_mask_between_them():
    [_, answers] = segmented_inputs(*a_micro_batch([(100, (80, 82, 79, 81))]))[0]["segmented"].calls
    assert answers.sees.shape == (1, 1, 82, 182)


def test_trajectories_of_one_length_that_share_nothing_stay_beside_one_another():
    assert segmented_inputs(*a_micro_batch([(0, (20,))] * 5)) is None
    assert segmented_inputs(*a_micro_batch([(2, (40, 40))])) is None
    assert segmented_inputs(*a_micro_batch([(20, (20, 20))])) is not None


def test_gradients_of_what_is_taken_many_times_are_summed_in_float32():
    row_1H = torch.ones(1, 4, dtype=torch.bfloat16, requires_grad=True)
    take(row_1H, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert row_1H.grad.tolist() == [[1000.0] * 4]  # one by one in bfloat16 they end at 256
