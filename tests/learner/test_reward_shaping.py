"""RewardShaper: rewards before they are learned from, and what is left out of a step."""

from dataclasses import replace

import pytest
import torch

from learner.reward_settings import GROUP_RELATIVE, KlSettings, RewardSettings
from learner.reward_shaping import RewardShaper
from learner.training import TrainBatch
from tests.builders_learner import a_batch, a_group, a_trajectory, random_groups

# equal rewards; unequal ones, one of them truncated; a group of one
GROUPS = [
    a_group(a_trajectory(reward=1.0), a_trajectory((0, 1, 1, 1), reward=1.0)),
    a_group(a_trajectory(reward=3.0), a_trajectory((0, 0, 1, 1, 1), reward=-1.0, terminated=False)),
    a_group(a_trajectory(reward=0.5)),
]


def shaped(batch: TrainBatch, **settings) -> tuple[TrainBatch, dict[str, float]]:
    return RewardShaper(RewardSettings(**settings)).shape(batch)


def test_without_settings_the_batch_stays_as_it_is():
    batch = a_batch(GROUPS)
    after, metrics = shaped(batch)
    assert after == batch
    assert metrics == pytest.approx({"equal_reward_groups": 2 / 3, "length_mean": 12 / 5, "truncated": 0.2})


def test_long_completions_are_punished_softly_by_their_sampled_tokens_whether_these_are_trained_or_not():
    for version in (0, 9):  # at 9 none of the tokens is fresh enough
        batch = a_batch(GROUPS, version=version)
        after, metrics = shaped(batch, overlong_buffer=2, overlong_length=4, overlong_penalty=0.5)
        assert after.rewards_N.tolist() == [1.0, 0.75, 3.0, -1.25, 0.5]
        assert metrics["shaped_reward"] == pytest.approx(0.8)
        assert metrics["equal_reward_groups"] == pytest.approx(1 / 3)


def test_rewards_are_normalized_and_then_clipped():
    batch = replace(a_batch(random_groups(0)), rewards_N=torch.tensor([0.0] * 11 + [12.0]))
    after, _ = shaped(batch, normalization="batch", clip=3.0)
    assert after.rewards_N[-1] == 3.0
    plain, _ = shaped(batch, normalization="batch")
    assert float(plain.rewards_N.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(plain.rewards_N.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("normalization", ["batch", "running"])
def test_rewards_that_never_differed_are_normalized_to_zero(normalization):
    batch = replace(a_batch(random_groups(0)), rewards_N=torch.full((12,), 0.1))
    after, _ = shaped(batch, normalization=normalization)
    assert not after.rewards_N.any()


def test_running_normalization_is_by_all_rewards_so_far_the_batchs_own_included():
    shaper = RewardShaper(RewardSettings(normalization="running"))
    seen: list[float] = []
    for seed in range(3):
        batch = a_batch(random_groups(seed))
        after, _ = shaper.shape(batch)
        shaper.keep()
        seen += batch.rewards_N.tolist()
        so_far = torch.tensor(seen, dtype=torch.float64)
        expected = (batch.rewards_N - so_far.mean()) / (so_far.std(unbiased=False) + 1e-6)
        torch.testing.assert_close(after.rewards_N, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_rewards_of_a_step_that_was_not_taken_are_forgotten():
    batch, later = a_batch(random_groups(0)), a_batch(random_groups(1))
    untouched, disturbed = (RewardShaper(RewardSettings(normalization="running")) for _ in range(2))
    disturbed.shape(batch)
    assert torch.equal(disturbed.shape(later)[0].rewards_N, untouched.shape(later)[0].rewards_N)


def test_a_restored_shaper_goes_on_where_the_saved_one_was():
    settings = RewardSettings(normalization="running")
    saved, restored = RewardShaper(settings), RewardShaper(settings)
    saved.shape(a_batch(random_groups(0)))
    saved.keep()
    restored.restore(saved.state())
    later = a_batch(random_groups(1))
    assert torch.equal(saved.shape(later)[0].rewards_N, restored.shape(later)[0].rewards_N)


def test_only_running_normalization_has_a_state_and_a_run_that_begins_it_later_begins_afresh():
    assert RewardShaper(RewardSettings(normalization="batch")).state() == {}
    fresh = RewardShaper(RewardSettings(normalization="running"))
    before = {name: tensor.clone() for name, tensor in fresh.state().items()}
    fresh.restore({})
    assert torch.equal(fresh.state()["reward_moments"], before["reward_moments"])


def kept_tokens(batch: TrainBatch) -> list[int]:
    counts = [0] * len(batch.rewards_N)
    for micro in batch.micro_batches:
        for n, mask_T in zip(micro.trajectory_index_B.tolist(), micro.loss_mask_BT, strict=True):
            counts[n] = int(mask_T.sum())
    return counts


@pytest.mark.parametrize("size", [1, 10_000])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"drop_equal_groups": True}, [0, 0, 2, 3, 0]),
        ({"drop_truncated": True}, [2, 3, 2, 0, 2]),
        ({"drop_truncated": True, "drop_equal_groups": True}, [0, 0, 2, 0, 0]),
    ],
)
def test_what_is_dropped_is_neither_trained_nor_counted(settings, kept, size):
    batch = a_batch(GROUPS, micro_batch_tokens=size)
    after, metrics = shaped(batch, **settings)
    assert kept_tokens(after) == after.loss_tokens_N.tolist() == kept
    assert after.num_loss_tokens == metrics["trained_tokens"] == sum(kept)
    assert metrics["dropped_tokens"] == batch.num_loss_tokens - sum(kept)
    assert torch.equal(after.rewards_N, batch.rewards_N)
    assert kept_tokens(batch) == [2, 3, 2, 3, 2]


def test_groups_are_equal_or_not_after_the_penalty_for_length_and_the_clip():
    longer = {"overlong_buffer": 3, "overlong_length": 3, "drop_equal_groups": True}
    assert shaped(a_batch(GROUPS), **longer)[0].loss_tokens_N.tolist() == [2, 3, 2, 3, 0]
    unequal = [a_group(a_trajectory(reward=5.0), a_trajectory(reward=9.0)), GROUPS[1]]
    assert shaped(a_batch(unequal), clip=4.0, drop_equal_groups=True)[0].loss_tokens_N.tolist() == [0, 0, 2, 3]


def test_when_everything_is_dropped_there_is_still_something_to_divide_by():
    after, metrics = shaped(a_batch(GROUPS[:1]), drop_equal_groups=True)
    assert (after.num_loss_tokens, metrics["trained_tokens"]) == (1, 0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"overlong_buffer": -1}, "overlong_buffer must be >= 0, got -1; 0 punishes no length"),
        ({"overlong_penalty": 0.0}, "overlong_penalty must be finite and > 0, got 0.0"),
        ({"clip": 0.0}, "reward_clip must be finite and > 0, got 0.0"),
        ({"clip": float("nan")}, "reward_clip must be finite and > 0, got nan"),
        ({"overlong_length": 9}, "overlong_length and overlong_penalty punish nothing while overlong_buffer is 0"),
        ({"overlong_penalty": 2.0}, "overlong_length and overlong_penalty punish nothing while overlong_buffer is 0"),
        (
            {"overlong_buffer": 10, "overlong_length": 9},
            "overlong_buffer must be at most overlong_length 9, got 10",
        ),
        ({"overlong_buffer": 10}, "overlong_buffer must be at most overlong_length None, got 10"),
    ],
)
def test_reward_settings_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=r"overlong|clip") as refusal:
        RewardSettings(**settings)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("advantage", ["gae", "reinforce", "reinforce_plus_plus"])
def test_equal_groups_are_not_dropped_where_they_have_a_gradient(advantage):
    with pytest.raises(ValueError, match=f"with advantage {advantage} a group of equal rewards has a gradient"):
        RewardSettings(drop_equal_groups=True).check_advantage(advantage)
    for other in GROUP_RELATIVE:
        RewardSettings(drop_equal_groups=True).check_advantage(other)
    RewardSettings(drop_truncated=True).check_advantage(advantage)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"coefficient": -0.1}, "kl_coefficient must be finite and >= 0, got -0.1; 0 needs no reference"),
        ({"coefficient": float("nan")}, "kl_coefficient must be finite and >= 0, got nan; 0 needs no reference"),
        ({"coefficient": 0.1, "target": 0.0}, "kl_target must be finite and > 0 nats per trajectory, got 0.0"),
        ({"target": 6.0}, "kl_target multiplies kl_coefficient, which is 0 and would stay so; set where it starts"),
        ({"estimator": "k2"}, "kl_estimator k2 estimates nothing while kl_coefficient is 0"),
        ({"coefficient": 0.1}, "kl_coefficient 0.1 needs a reference_model"),
        (
            {"reference_offload": True},
            "reference_offload: there is no reference; set kl_coefficient or reference_model",
        ),
        (
            {"coefficient": 0.1, "estimator": "k1"},
            "kl_estimator k1 in the loss has a gradient that does not depend on the reference; "
            "take k2 or k3, or --kl-in reward",
        ),
    ],
)
def test_kl_settings_that_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(ValueError, match=r"kl_|reference_") as refusal:
        KlSettings(**settings)
    assert str(refusal.value) == sentence


def test_the_estimator_follows_from_the_place_unless_told_otherwise():
    chosen = {
        (place, estimator): KlSettings(
            coefficient=0.1, place=place, estimator=estimator, reference_model="m"
        ).chosen_estimator
        for place, estimator in [("loss", None), ("reward", None), ("loss", "k2"), ("reward", "k3")]
    }
    assert list(chosen.values()) == ["k3", "k1", "k2", "k3"]
