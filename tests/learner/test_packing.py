"""Packed rows: what is said of a trajectory does not depend on what lies beside it."""

import pytest
import torch

from learner.batch_codec import part_of
from learner.cutting import cut_into_micro_batches
from learner.networks import CriticNetwork, PolicyNetwork
from learner.packing import Arrangement, HiddenStates, body_inputs, can_pack, can_spread, lay_out_rows
from learner.shared_prompts import Unit
from learner.training import BatchLayout
from tests.builders_learner import a_batch, random_groups
from tests.models import VOCAB_SIZE, a_model_that_mixes_rows_up, a_tiny_model

CPU = torch.device("cpu")
MICRO = a_batch(random_groups(0, num_groups=4)).micro_batches[0]
INPUTS = (MICRO.token_ids_BT, MICRO.attention_mask_BT, MICRO.loss_mask_BT)


def test_trajectories_fill_rows_as_long_as_the_longest_and_overlap_nowhere():
    lengths = [3, 9, 4, 5, 2, 1, 8]
    places = lay_out_rows(lengths)
    assert places.row_length == 9
    taken = set()
    for row, start, length in zip(places.rows, places.starts, lengths, strict=True):
        assert start + length <= places.row_length
        cells = {(row, start + offset) for offset in range(length)}
        assert not taken & cells
        taken |= cells
    assert places.num_rows == 4
    assert lay_out_rows(lengths, in_one_row=True).num_tokens == sum(lengths)


def test_packed_log_probabilities_entropies_and_gradients_are_those_of_padded_trajectories():
    outcomes = []
    for packs in (False, True):
        network = PolicyNetwork(a_tiny_model(0, tied=True), temperature=0.7, trains_entropy=True)
        network.arrangement = Arrangement(packs=packs)
        logprobs_BT, entropy_BT = network(*INPUTS)
        (logprobs_BT.sum() + entropy_BT.square().sum()).backward()
        gradients = [parameter.grad / parameter.grad.abs().max() for parameter in network.parameters()]
        outcomes.append([logprobs_BT.detach(), entropy_BT.detach(), *gradients])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_packed_values_are_those_of_padded_trajectories_also_after_the_last_token():
    critic = CriticNetwork(a_tiny_model(0, tied=True).model)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    ids_BS, mask_BS = (torch.nn.functional.pad(each, (0, 1)) for each in INPUTS[:2])
    padded_BS = critic(ids_BS, mask_BS)
    critic.arrangement = Arrangement(packs=True)
    asked_BS = torch.nn.functional.pad(MICRO.attention_mask_BT, (1, 0), value=True)
    torch.testing.assert_close(critic(ids_BS, mask_BS)[asked_BS], padded_BS[asked_BS], rtol=1e-4, atol=1e-4)


def test_packing_computes_less():
    inputs, _ = body_inputs(a_tiny_model(0, tied=True), *INPUTS[:2], Arrangement(packs=True))
    assert inputs["input_ids"].numel() < 0.85 * MICRO.token_ids_BT.numel()
    assert "attention_mask" not in inputs  # with one, transformers would read a row as one text
    assert inputs["use_cache"] is False


class SecondOfTwo:
    """Ranks that nobody exchanges anything with."""

    rank, size = 1, 2


@pytest.mark.parametrize("packs", [False, True])
def test_of_rows_that_are_spread_a_rank_computes_its_stretch_alone(packs):
    model, (ids_BT, mask_BT, loss_mask_BT) = a_tiny_model(0, tied=True), INPUTS
    inputs, whereabouts = body_inputs(model, ids_BT, mask_BT, Arrangement(packs=packs, ranks=SecondOfTwo()))
    rows, length = inputs["input_ids"].shape
    assert inputs["position_ids"].shape == (rows, length)
    assert length == -(-ids_BT.shape[1] // 2)
    places_BT, is_here_BT = whereabouts.on_this_rank()
    here_BT = is_here_BT & mask_BT
    assert torch.equal(inputs["input_ids"].flatten()[places_BT[here_BT]], ids_BT[here_BT])
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    assert torch.equal(inputs["position_ids"].flatten()[places_BT[here_BT]], positions_BT[here_BT])
    assert 0 < int(here_BT.sum()) < int(mask_BT.sum())
    hidden = HiddenStates(torch.zeros(rows * length, 1), whereabouts)
    asked_BT = hidden.following(loss_mask_BT)
    assert torch.equal(asked_BT[:, 1:], loss_mask_BT[:, 1:] & is_here_BT[:, :-1])


def test_a_model_whose_attention_does_not_ask_other_ranks_is_found_out():
    body = a_tiny_model(0, tied=True).base_model
    body.config._attn_implementation = "eager"
    assert not can_spread(body, VOCAB_SIZE, CPU, Arrangement(packs=True, ranks=SecondOfTwo()))


def test_ranks_that_share_a_micro_batch_get_as_many_times_more_tokens_and_the_same_part():
    layout = BatchLayout(num_parts=2, ranks_per_part=3, ranks_per_sequence=3)
    usual = cut_into_micro_batches(LENGTHS, 60, BatchLayout(num_parts=2))
    assert cut_into_micro_batches(LENGTHS, 20, layout) == usual
    batch = a_batch(random_groups(0), micro_batch_tokens=10, layout=layout)
    parts = [[id(micro) for micro in part_of(batch, rank, layout).micro_batches] for rank in range(6)]
    assert parts[0] == parts[1] == parts[2]
    assert parts[3] == parts[4] == parts[5]
    assert sorted(parts[0] + parts[3]) == sorted(id(micro) for micro in batch.micro_batches)


def test_a_model_that_keeps_trajectories_apart_may_be_packed():
    assert can_pack(a_tiny_model(0, tied=True).base_model, VOCAB_SIZE, CPU)


def test_a_model_that_would_mix_them_up_is_found_out():
    assert not can_pack(a_model_that_mixes_rows_up(), VOCAB_SIZE, CPU)


LENGTHS = [((index * 37) % 41) + 1 for index in range(60)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 50, 200, 100_000])
@pytest.mark.parametrize("packs", [False, True])
def test_every_trajectory_is_in_one_micro_batch_and_ranks_have_as_many(num_ranks, budget, packs):
    cut = cut_into_micro_batches(LENGTHS, budget, BatchLayout(num_parts=num_ranks, packs=packs))
    assert sorted(index for indexes in cut for index in indexes) == list(range(60))
    assert len(cut) % num_ranks == 0
    for indexes in cut:
        lengths = [LENGTHS[index] for index in indexes]
        if len(indexes) > 1:
            assert (lay_out_rows(lengths).num_tokens if packs else len(lengths) * max(lengths)) <= budget


def units_of(lengths: list[int], prefix: int) -> list[Unit]:
    return [Unit(first, 6, min(prefix, *lengths[first : first + 6])) for first in range(0, len(lengths), 6)]


def computed(indexes: list[int], units: list[Unit]) -> int:
    """Tokens, each prompt once in a micro-batch."""
    prompts = {unit.first: unit.prefix for unit in units}
    own = sum(LENGTHS[index] - prompts[index // 6 * 6] for index in indexes)
    return own + sum(prompts[first] for first in {index // 6 * 6 for index in indexes})


@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 50, 200, 100_000])
def test_trajectories_that_share_a_prompt_stay_together_within_the_budget(num_parts, budget):
    units = units_of(LENGTHS, prefix=20)
    cut = cut_into_micro_batches(LENGTHS, budget, BatchLayout(num_parts=num_parts, shares_prompts=True), units)
    assert sorted(index for indexes in cut for index in indexes) == list(range(60))
    assert len(cut) % num_parts == 0
    for indexes in cut:
        if len(indexes) > 1:
            assert computed(indexes, units) <= budget
            assert len(indexes) * max(LENGTHS[index] for index in indexes) <= 4 * budget
    if budget == 100_000:
        assert sum(computed(indexes, units) for indexes in cut) <= 1.2 * computed(list(range(60)), units)


def test_a_group_that_is_all_there_is_is_shared_out_over_parts():
    units = [Unit(0, 60, 1)]
    cut = cut_into_micro_batches(LENGTHS, 100_000, BatchLayout(num_parts=4, shares_prompts=True), units)
    tokens = [sum(LENGTHS[index] for index in indexes) for indexes in cut]
    assert len(cut) == 4
    assert max(tokens) <= 1.4 * min(tokens)


def test_a_long_prompt_is_not_computed_on_more_parts_than_it_takes_to_share_out_the_answers():
    lengths, units = [1050] * 16, [Unit(0, 8, 1000), Unit(8, 8, 1000)]
    cut = cut_into_micro_batches(lengths, 100_000, BatchLayout(num_parts=4, shares_prompts=True), units)
    assert [len(indexes) for indexes in cut] == [4] * 4


def test_long_prompts_let_no_more_into_a_micro_batch_than_attention_can_copy():
    lengths = [101] * 64
    [*cut] = cut_into_micro_batches(lengths, 200, BatchLayout(shares_prompts=True), [Unit(0, 64, 100)])
    assert max(map(len, cut)) == 7


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_ranks_of_a_turn_have_about_as_many_tokens(num_ranks):
    cut = cut_into_micro_batches(LENGTHS * 10, 400, BatchLayout(num_parts=num_ranks, packs=True))
    tokens = [sum((LENGTHS * 10)[index] for index in indexes) for indexes in cut]
    whole_turns = [tokens[start : start + num_ranks] for start in range(num_ranks, len(tokens), num_ranks)]
    assert len(whole_turns) > 3
    assert all(max(turn) <= 1.15 * min(turn) for turn in whole_turns)  # the first, of what was left over, may not be
