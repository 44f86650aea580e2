"""What is sampled is trained, under long-tailed lengths (p99 ten times the median) at staleness 2; nobody starves."""

import pytest

from learner.coordinator.batches import Batches
from learner.coordinator.explain import what_the_learner_waits_for
from learner.coordinator.settings import CoordinatorSettings
from tests.simulation.scaling_run import ScalingRun, Scenario, run

MAX_NEVER_TRAINED = 0.05  # of the sampled tokens
LONG_TAILED = Scenario(servers=16, groups_per_server=4, groups_per_step=16, steps=30, max_s=1e9, training_s=20.0)
SAMPLING_IS_SHORT = Scenario(servers=8, groups_per_server=4, groups_per_step=8, steps=30, median_s=4.0, training_s=20.0)
SAMPLING_IS_LONG = Scenario(
    servers=16, groups_per_server=4, groups_per_step=8, steps=30, median_s=60.0, max_s=1e9, training_s=20.0
)


@pytest.mark.parametrize("scenario", [LONG_TAILED, SAMPLING_IS_SHORT, SAMPLING_IS_LONG])
def test_nearly_every_sampled_token_is_trained_and_none_when_it_is_too_old(scenario):
    assert scenario.stale_action == CoordinatorSettings.__dataclass_fields__["stale_action"].default
    outcome = run(scenario)
    assert outcome.never_trained <= MAX_NEVER_TRAINED
    assert outcome.max_staleness <= scenario.max_staleness == 2


def test_that_figure_shows_what_waiting_for_slow_groups_saves(monkeypatch):
    assert run(LONG_TAILED.with_action("requeue")).never_trained > MAX_NEVER_TRAINED
    assert run(LONG_TAILED.with_action("mask")).never_trained > MAX_NEVER_TRAINED
    monkeypatch.setattr(Batches, "late_after", lambda self, version: None)  # pacing alone: samples are only counted
    assert run(LONG_TAILED).never_trained > MAX_NEVER_TRAINED


def slowest_of(num_tasks: int) -> int:
    return max(range(num_tasks), key=LONG_TAILED.length_s)


@pytest.mark.parametrize("action", ["wait", "mask", "requeue"])
def test_no_task_starves_and_the_slowest_is_trained_too(action):
    world = ScalingRun(LONG_TAILED.with_action(action))
    world.begin_all()
    world.go_on(stop=lambda: False)
    num_tasks = len(world.trained_tasks) // 2
    assert slowest_of(num_tasks) in world.trained_tasks
    assert set(range(num_tasks)) <= world.trained_tasks


def test_the_slowest_task_is_named_while_the_learner_waits_for_it():
    world, slowest = ScalingRun(LONG_TAILED), slowest_of(300)
    world.begin_all()

    def is_awaited() -> bool:
        enough = len(world.core.book.queue) >= LONG_TAILED.groups_per_step
        lease = world.core.book.awaited()
        return lease is not None and lease.task_id == slowest and enough and not world.core.book.batch()

    world.go_on(stop=is_awaited)
    text = what_the_learner_waits_for(world.core, world.clock.now, listen_address="tcp://learner:1")
    assert f"(task {slowest}) since " in text
    assert text.startswith("server server-")
