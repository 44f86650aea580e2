import numpy as np
import pytest
import torch

from learner.batching import build_batch
from tests.builders_learner import a_batch, a_group, a_trajectory, random_groups


def test_trajectories_are_padded_at_the_end_and_the_padding_is_neither_seen_nor_trained():
    micro = a_batch([a_group(a_trajectory((0, 1, 1, 1, 1)), a_trajectory((0, 0, 1)))]).micro_batches[0]
    assert micro.token_ids_BT.tolist() == [[3, 4, 5, 0, 0], [3, 4, 5, 6, 7]]
    assert micro.attention_mask_BT.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert micro.loss_mask_BT.tolist() == [[False, False, True, False, False], [False, True, True, True, True]]
    assert micro.trajectory_index_B.tolist() == [1, 0]


def test_every_token_a_policy_sampled_is_trained_on_exactly_once_with_what_belongs_to_it():
    groups = random_groups(0, num_groups=4)
    batch = a_batch(groups, micro_batch_tokens=30)
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    seen = []
    for micro in batch.micro_batches:
        for row, index in enumerate(micro.trajectory_index_B.tolist()):
            trajectory, length = trajectories[index], len(trajectories[index])
            np.testing.assert_array_equal(micro.token_ids_BT[row, :length], trajectory.token_ids)
            np.testing.assert_array_equal(micro.loss_mask_BT[row, :length], trajectory.loss_mask)
            np.testing.assert_array_equal(micro.behavior_logprobs_BT[row, :length], trajectory.behavior_logprobs)
            seen.append(index)
    assert sorted(seen) == list(range(len(trajectories)))
    assert batch.num_loss_tokens == sum(group.num_sampled_tokens for group in groups)
    assert batch.loss_tokens_N.tolist() == [int(trajectory.loss_mask.sum()) for trajectory in trajectories]
    assert torch.equal(batch.lengths_N, batch.loss_tokens_N)
    assert batch.terminated_N.tolist() == [each.finish_reason.value == "terminated" for each in trajectories]
    assert batch.group_index_N.tolist() == [index for index in range(4) for _ in range(4)]
    assert batch.rewards_N.tolist() == pytest.approx([trajectory.reward for trajectory in trajectories])


@pytest.mark.parametrize("budget", [1, 13, 30, 64, 10_000])
def test_a_micro_batch_stays_within_the_token_budget_unless_one_trajectory_alone_does_not(budget):
    for micro in a_batch(random_groups(3, num_groups=5), micro_batch_tokens=budget).micro_batches:
        assert micro.token_ids_BT.numel() <= budget or len(micro.token_ids_BT) == 1


def test_a_token_older_than_the_limit_stays_as_context_and_is_counted():
    trajectory = a_trajectory((0, 1, 1, 1, 1), versions=[4, 7, 8, 10])
    batch = build_batch([a_group(trajectory)], version=10, max_staleness=2, micro_batch_tokens=100)
    micro = batch.micro_batches[0]
    assert micro.loss_mask_BT.tolist() == [[False, False, False, True, True]]
    assert micro.attention_mask_BT.all()
    assert micro.staleness_BT.tolist() == [[0, 6, 3, 2, 0]]
    assert (batch.num_loss_tokens, batch.num_over_stale_tokens) == (2, 2)
    assert (batch.loss_tokens_N.tolist(), batch.lengths_N.tolist()) == ([2], [4])


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_no_batch_holds_a_loss_token_beyond_the_limit(max_staleness):
    groups = random_groups(5, version=1) + random_groups(6, version=4)
    batch = build_batch(groups, version=4, max_staleness=max_staleness, micro_batch_tokens=50)
    for micro in batch.micro_batches:
        assert not (micro.loss_mask_BT & (micro.staleness_BT > max_staleness)).any()
    sampled = sum(group.num_sampled_tokens for group in groups)
    assert batch.num_loss_tokens + batch.num_over_stale_tokens == sampled


def test_a_first_token_has_nothing_before_it_so_it_is_not_trained_on_and_not_called_stale():
    batch = a_batch([a_group(a_trajectory((1, 1, 1)))])
    assert batch.micro_batches[0].loss_mask_BT.tolist() == [[False, True, True]]
    assert (batch.num_loss_tokens, batch.num_over_stale_tokens) == (2, 0)
