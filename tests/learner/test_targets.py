"""Targets of real batches, multi-turn and cut anyhow, against the formulas written as loops."""

import math
from dataclasses import replace

import pytest
import torch

from learner.algorithms import ADVANTAGES, build_advantages
from learner.opinions import Opinions
from learner.targets import Targets, build_targets
from learner.training import TrainBatch
from tests.builders_learner import a_batch, random_groups
from tests.oracles import advantages as oracles
from tests.oracles.advantages import Episode

GROUPS = random_groups(4)  # prompts, turns of the environment, truncated and terminated ones
TRAJECTORIES = [trajectory for group in GROUPS for trajectory in group.trajectories]


def value_at(trajectory: int, position: int) -> float:
    return math.sin(100 * trajectory + position)


def cost_at(trajectory: int, position: int) -> float:
    return 0.1 * math.cos(100 * trajectory + position)


def the_episodes() -> list[Episode]:
    """Straight from the trajectories, by the rules that a reader would apply by hand."""
    episodes = []
    for n, trajectory in enumerate(TRAJECTORIES):
        places = [t for t, sampled in enumerate(trajectory.loss_mask) if sampled]
        episodes.append(
            Episode(
                reward=trajectory.reward,
                group=n // len(GROUPS[0].trajectories),
                costs=[cost_at(n, t) for t in places],
                values=[value_at(n, t) for t in places],
                after=value_at(n, places[-1] + 1),
                terminated=trajectory.finish_reason.value == "terminated",
                places=places,
            )
        )
    return episodes


def opinions_on(batch: TrainBatch) -> Opinions:
    """Also of places where there is nothing to say, and there nonsense."""

    def table(at, extra: int) -> list[torch.Tensor]:
        return [
            torch.tensor(
                [
                    [at(n, t) if t < len(TRAJECTORIES[n]) + 1 else math.nan for t in range(mask_BT.shape[1] + extra)]
                    for n in index_B.tolist()
                ]
            )
            for mask_BT, index_B in ((micro.loss_mask_BT, micro.trajectory_index_B) for micro in batch.micro_batches)
        ]

    return Opinions(values_BS=table(value_at, 1), token_rewards_BT=table(cost_at, 0), logprobs_BT=table(cost_at, 0))


def by_trajectory(batch: TrainBatch, tensors: list[torch.Tensor]) -> list[list[float]]:
    """Of each trajectory, what its trained tokens have."""
    rows: list[list[float]] = [[] for _ in TRAJECTORIES]
    for micro, tensor_BT in zip(batch.micro_batches, tensors, strict=True):
        for b, n in enumerate(micro.trajectory_index_B.tolist()):
            rows[n] = tensor_BT[b][micro.loss_mask_BT[b]].tolist()
            assert not tensor_BT[b][~micro.loss_mask_BT[b]].any()
    return rows


def targets_of(batch: TrainBatch, advantage: str, **settings: float) -> list[Targets]:
    targets, _ = build_targets(batch, opinions_on(batch), build_advantages(advantage, settings))
    return targets


@pytest.mark.parametrize("bootstrap", [False, True])
@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_a_critics_targets_are_those_of_the_formula_over_sampled_tokens_alone(size, bootstrap):
    batch = a_batch(GROUPS, micro_batch_tokens=size)
    chosen = {"gamma": 0.9, "gae_lambda": 0.8, "bootstrap_truncated": bootstrap}
    targets = targets_of(batch, "gae", **chosen)
    advantages, returns = oracles.gae(the_episodes(), **chosen)
    assert_close(by_trajectory(batch, [target.advantages_BT for target in targets]), oracles.whitened(advantages))
    assert_close(by_trajectory(batch, [target.returns_BT for target in targets]), returns)
    for target, values_BS in zip(targets, opinions_on(batch).values_BS, strict=True):
        assert torch.equal(target.old_values_BT.nan_to_num(), values_BS[:, :-1].nan_to_num())


@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_returns_to_go_are_those_of_the_formula_over_sampled_tokens_alone(size):
    batch = a_batch(GROUPS, micro_batch_tokens=size)
    targets = targets_of(batch, "reinforce_plus_plus", gamma=0.9)
    expected = oracles.reinforce_plus_plus(the_episodes(), gamma=0.9)
    assert_close(by_trajectory(batch, [target.advantages_BT for target in targets]), expected)


@pytest.mark.parametrize("size", [1, 40, 10_000])
def test_where_a_setting_says_so_time_runs_over_the_environments_tokens_too(size):
    batch, episodes = a_batch(GROUPS, micro_batch_tokens=size), the_episodes()
    assert any(episode.places[-1] - episode.places[0] > len(episode.places) - 1 for episode in episodes)
    timed = [oracles.returns_in_time(episode.rewards(), episode.places, 0.9) for episode in episodes]
    got = targets_of(batch, "reinforce", gamma=0.9, count_environment=1)
    assert_close(by_trajectory(batch, [target.advantages_BT for target in got]), timed)
    advantages, returns = oracles.gae_in_time(episodes, gamma=0.9, gae_lambda=0.8)
    got = targets_of(batch, "gae", gamma=0.9, gae_lambda=0.8, count_environment=1)
    assert_close(by_trajectory(batch, [target.advantages_BT for target in got]), oracles.whitened(advantages))
    assert_close(by_trajectory(batch, [target.returns_BT for target in got]), returns)


def test_on_policy_v_trace_runs_over_the_environments_tokens_likewise():
    batch = a_batch(GROUPS)
    [micro] = batch.micro_batches
    opinions = replace(opinions_on(batch), logprobs_BT=[micro.behavior_logprobs_BT])
    settings = {"gamma": 0.9, "gae_lambda": 0.8, "count_environment": 1}
    targets, _ = build_targets(batch, opinions, build_advantages("vtrace", settings))
    _, returns = oracles.gae_in_time(the_episodes(), gamma=0.9, gae_lambda=0.8)
    assert_close(by_trajectory(batch, [target.returns_BT for target in targets]), returns)


def assert_close(rows: list[list[float]], expected: list[list[float]]) -> None:
    for row, expected_row in zip(rows, expected, strict=True):
        assert row == pytest.approx(expected_row, abs=2e-6)


@pytest.mark.parametrize("advantage", sorted(ADVANTAGES))
def test_how_the_batch_is_cut_changes_no_advantage(advantage):
    cuts = [a_batch(GROUPS, micro_batch_tokens=size) for size in (1, 40, 10_000)]
    one, *others = (
        by_trajectory(batch, [target.advantages_BT for target in targets_of(batch, advantage)]) for batch in cuts
    )
    assert one == others[0] == others[1]


def worth_nothing(batch: TrainBatch) -> list[torch.Tensor]:
    """values_BS of a critic that knows nothing yet."""
    return [torch.nn.functional.pad(torch.zeros(micro.loss_mask_BT.shape), (0, 1)) for micro in batch.micro_batches]


def test_the_metrics_tell_how_much_of_the_returns_the_critic_foresaw():
    batch = replace(a_batch(GROUPS), terminated_N=torch.ones(len(TRAJECTORIES), dtype=torch.bool))
    estimate = build_advantages("gae", {})
    [target], metrics = build_targets(batch, Opinions(values_BS=worth_nothing(batch)), estimate)
    assert metrics["explained_variance"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["advantage_mean"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["advantage_std"] == pytest.approx(1.0, abs=1e-4)
    foreseen = [torch.nn.functional.pad(target.returns_BT, (0, 1))]
    _, metrics = build_targets(batch, Opinions(values_BS=foreseen), estimate)
    assert metrics["explained_variance"] == pytest.approx(1.0, abs=1e-9)


def test_equal_rewards_leave_nothing_to_explain():
    batch = replace(a_batch(GROUPS), rewards_N=torch.zeros(len(TRAJECTORIES)))
    _, metrics = build_targets(batch, Opinions(values_BS=worth_nothing(batch)), build_advantages("gae", {}))
    assert metrics == dict.fromkeys(("advantage_mean", "advantage_std", "advantage_min", "advantage_max"), 0.0)
