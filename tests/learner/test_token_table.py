"""TokenTable: the same table, however the batch is cut and whoever holds which part of it."""

import math

import pytest
import torch

from learner.token_table import TokenTable
from tests.builders_learner import a_batch, a_group, a_trajectory, random_groups

SIZES = (1, 40, 10_000)


def numbered(batch) -> list[torch.Tensor]:
    """[B, T] of each micro-batch: 100 * trajectory + position; nan where no token is trained."""
    return [
        torch.where(
            micro.loss_mask_BT,
            100.0 * micro.trajectory_index_B.unsqueeze(1) + torch.arange(micro.loss_mask_BT.shape[1]),
            math.nan,
        )
        for micro in batch.micro_batches
    ]


def a_table(batch) -> TokenTable:
    return TokenTable(batch.micro_batches, batch.loss_tokens_N)


def test_a_row_holds_the_trained_tokens_of_a_trajectory_in_order_and_nothing_between_turns():
    batch = a_batch([a_group(a_trajectory((0, 1, 1, 0, 0, 1)), a_trajectory((0, 0, 1)))])
    table = a_table(batch)
    assert table.mask_NK.tolist() == [[True, True, True], [True, False, False]]
    assert table.gather(numbered(batch)).tolist() == [[1.0, 2.0, 5.0], [102.0, 0.0, 0.0]]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_gathered_and_scattered_is_back_in_its_place(size):
    batch = a_batch(random_groups(0), micro_batch_tokens=size)
    table = a_table(batch)
    tensors = numbered(batch)
    for micro, before, after in zip(batch.micro_batches, tensors, table.scatter(table.gather(tensors)), strict=True):
        assert torch.equal(after, torch.where(micro.loss_mask_BT, before, 0.0))


def test_the_table_does_not_depend_on_how_the_batch_is_cut():
    one, *others = (
        a_table(batch).gather(numbered(batch))
        for batch in (a_batch(random_groups(0), micro_batch_tokens=size) for size in SIZES)
    )
    assert all(torch.equal(one, other) for other in others)


def test_tables_of_the_parts_that_ranks_hold_add_up_to_the_table_of_the_batch():
    batch = a_batch(random_groups(0), micro_batch_tokens=40)
    tensors, after = numbered(batch), [torch.nn.functional.pad(each, (0, 1), value=7.0) for each in numbered(batch)]
    whole = a_table(batch)
    parts = [TokenTable(batch.micro_batches[rank::2], batch.loss_tokens_N) for rank in (0, 1)]
    assert torch.equal(sum(part.gather(tensors[rank::2]) for rank, part in enumerate(parts)), whole.gather(tensors))
    assert torch.equal(
        sum(part.gather_after_last(after[rank::2]) for rank, part in enumerate(parts)).nan_to_num(),
        whole.gather_after_last(after).nan_to_num(),
    )


@pytest.mark.parametrize("size", SIZES)
def test_what_stands_after_the_last_trained_token_is_found_also_at_the_end_of_a_row(size):
    groups = [a_group(a_trajectory((0, 1, 1)), a_trajectory((0, 1, 1, 0, 1, 0, 0)), a_trajectory((0, 1), versions=0))]
    batch = a_batch(groups, micro_batch_tokens=size)
    places = [
        100.0 * micro.trajectory_index_B.unsqueeze(1) + torch.arange(micro.loss_mask_BT.shape[1] + 1)
        for micro in batch.micro_batches
    ]
    assert a_table(batch).gather_after_last(places).tolist() == [3.0, 105.0, 202.0]


def test_a_trajectory_without_a_trained_token_has_an_empty_row():
    stale, fresh = a_trajectory(versions=0), a_trajectory((0, 1, 1, 1), versions=9)
    batch = a_batch([a_group(stale, fresh)], version=9)
    table = a_table(batch)
    assert table.mask_NK.tolist() == [[False] * 3, [True] * 3]
    assert table.gather_after_last([torch.ones(2, 5)]).tolist() == [0.0, 1.0]
