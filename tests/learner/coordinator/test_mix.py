"""Tasks of several environments: their shares, their rows, and what happens when one of them is down."""

import json
from collections import Counter

import pytest

from common.environments import ENVIRONMENT_UNAVAILABLE, Environments
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import DeliverBatch
from learner.coordinator.explain import what_a_server_waits_for, what_the_learner_waits_for
from learner.coordinator.ledger import MAX_WAITING_TASKS, TaskLedger
from learner.coordinator.mix import CYCLE, Mix
from learner.coordinator.tasks import open_tasks
from tests.builders_coordinator import a_coordinator, grants, group_for, join, of_kind

NAMES = ("a", "b")


def two_environments(**overrides) -> Coordinator:
    """Tasks with an even number are of environment 0, the others of environment 1."""
    values = {"groups_per_step": 4, "environments": NAMES, "environment_weights": (1.0, 1.0)}
    return a_coordinator(**(values | overrides))


def environments_of(coordinator, granted):
    return [coordinator.book.mix.environment_of(grant.task_id) for grant in granted]


def fail(coordinator, grant, *, now, server_id="s"):
    """Leases granted because the environment could not be reached."""
    return grants(
        coordinator.lease_failed(server_id, grant.lease_id, ENVIRONMENT_UNAVAILABLE, "connection refused", now)
    )


# --- whose turn it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 1.0), (3.0, 1.0), (0.5, 0.3, 0.2), (998.0, 1.0, 1.0)])
def test_each_environment_has_its_share_of_every_cycle_and_its_turns_are_spread_over_it(weights):
    mix = Mix(weights)
    turns = [mix.environment_of(task_id) for task_id in range(CYCLE)]
    shares = {index: count / CYCLE for index, count in Counter(turns).items()}
    assert shares == pytest.approx({index: weight / sum(weights) for index, weight in enumerate(weights)})
    for count in (10, 100):
        for index, weight in enumerate(weights):
            assert abs(turns[:count].count(index) - count * weight / sum(weights)) <= len(weights)


def test_every_environment_counts_its_own_tasks_without_a_gap():
    mix = Mix((3.0, 2.0))
    for environment in range(2):
        places = [place for task_id in range(3 * CYCLE) if (place := mix.place(task_id)).environment == environment]
        assert [place.index for place in places] == list(range(len(places)))


@pytest.mark.parametrize("weights", [(), (1.0, 0.0), (1.0,) * (CYCLE + 1)])
def test_a_mix_that_cannot_be_is_refused(weights):
    with pytest.raises(ValueError, match="a mix needs 1 to 1000 weights above 0"):
        Mix(weights)


def test_each_environment_goes_through_its_own_rows(tmp_path):
    for name in NAMES:
        rows = [json.dumps({"prompt": f"{name}{number}"}) for number in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    toml = {name: {"url": "python:x:y", "data": f"{tmp_path}/{name}.jsonl"} for name in NAMES}
    tasks = open_tasks("nowhere.jsonl", seed=0, specs=Environments.from_toml(toml).specs)
    epoch = [tasks.task(task_id) for task_id in range(10)]
    for index, name in enumerate(NAMES):
        prompts = [json.loads(task.row)["prompt"] for task in epoch if task.environment == index]
        assert sorted(prompts) == [f"{name}{number}" for number in range(5)]
    assert len({task.seed for task in epoch}) == 10
    assert tasks.name.startswith("a x 1: a.jsonl (5 rows")


def test_one_environment_with_data_of_its_own_reads_those(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"prompt": "p"}')
    specs = Environments.from_toml({"a": {"url": "x:", "data": f"{tmp_path}/own.jsonl"}}).specs
    assert open_tasks("nowhere.jsonl", seed=0, specs=specs).task(3).row == b'{"prompt": "p"}'


# --- an environment that is down ------------------------------------------------------------------------------------


def test_the_tasks_of_an_environment_that_is_down_wait_while_those_of_others_go_on():
    coordinator = two_environments(max_staleness=2)
    granted = join(coordinator, "s", groups=4)
    assert environments_of(coordinator, granted) == [0, 1, 0, 1]
    again = [grant for lost in granted if lost.task_id % 2 == 0 for grant in fail(coordinator, lost, now=1.0)]
    assert environments_of(coordinator, again) == [1, 1]
    for grant in [granted[1], granted[3], *again]:
        more = grants(coordinator.group_finished("s", group_for(grant), now=1.5))
        assert set(environments_of(coordinator, more)) <= {1}
    assert coordinator.members["s"].failures_in_a_row == coordinator.failures_in_a_row == 0
    assert coordinator.book.tasks.parked == {}
    assert coordinator.counts().balanced


def test_after_a_pause_one_lease_tries_the_environment_and_its_waiting_tasks_come_back_once_that_succeeds():
    coordinator = two_environments(max_staleness=8, groups_per_step=8)
    granted = join(coordinator, "s", groups=4)
    for grant in granted:
        fail(coordinator, grant, now=1.0) if grant.task_id % 2 == 0 else None
    waiting = {grant.task_id for grant in granted if grant.task_id % 2 == 0}
    for lease in list(coordinator.book.running.values()):
        coordinator.group_finished("s", group_for(lease), now=1.0)
    tried = coordinator.tick(now=2.5)  # a pause of 1 s is over
    running = [lease for lease in coordinator.book.running.values() if lease.task_id % 2 == 0]
    assert grants(tried) == [] or len(running) <= 1
    coordinator.group_finished("s", group_for(next(iter(coordinator.book.running.values()))), now=2.5)
    [trial] = [lease for lease in coordinator.book.running.values() if lease.task_id % 2 == 0]
    coordinator.group_finished("s", group_for(trial), now=2.6)
    assert coordinator.members["s"].down == {}
    done = set()
    while not waiting <= done | {trial.task_id}:
        lease = next(iter(coordinator.book.running.values()))
        done.add(lease.task_id)
        coordinator.group_finished("s", group_for(lease), now=3.0)


def test_pauses_grow_while_the_environment_stays_down_and_each_trial_is_one_lease():
    coordinator = a_coordinator(groups_per_step=4)
    granted = join(coordinator, "s", groups=4)
    for grant in granted:
        assert fail(coordinator, grant, now=0.0) == []
    trials = []
    for tenth in range(1, 600):
        for grant in grants(coordinator.heartbeat("s", progress=0, loaded_version=0, now=tenth / 10)):
            trials.append(tenth / 10)
            assert fail(coordinator, grant, now=tenth / 10) == []
    gaps = [round(later - earlier) for earlier, later in zip([0.0, *trials], trials, strict=False)]
    assert gaps == [1, 2, 4, 8, 10, 10, 10, 10]
    assert sorted(coordinator.book.tasks.given_back()) == list(range(coordinator.book.tasks.next_task_id))


def trained_in(seconds: int, *, down: frozenset[int]) -> Counter[int]:
    """Groups trained by environment, with one server for 8 groups at once, each of which takes a second."""
    coordinator = two_environments(max_staleness=2)
    join(coordinator, "s", groups=8)
    trained = Counter[int]()
    ends: dict[int, float] = {}
    for now in (tenth / 10 for tenth in range(10 * seconds)):
        coordinator.heartbeat("s", progress=0, loaded_version=coordinator.version, now=now)
        for lease in list(coordinator.book.running.values()):
            environment = coordinator.book.mix.environment_of(lease.task_id)
            if environment in down:
                coordinator.lease_failed("s", lease.lease_id, ENVIRONMENT_UNAVAILABLE, "connection refused", now)
            elif ends.setdefault(lease.lease_id, now + 1.0) <= now:
                coordinator.group_finished("s", group_for(lease), now)
        batch = of_kind(coordinator.take_batch(coordinator.version, now), DeliverBatch)
        for groups in [delivered.groups for delivered in batch]:
            trained.update(coordinator.book.mix.environment_of(group.task_id) for group in groups)
            coordinator.step_completed(coordinator.version + 1, tuple(group.lease_id for group in groups), now)
            coordinator.published(coordinator.version, now)
    assert coordinator.counts().balanced
    return trained


def test_others_lose_nothing_while_an_environment_is_down():
    both = trained_in(200, down=frozenset())
    alone = trained_in(200, down=frozenset({0}))
    assert both[0] == pytest.approx(both[1], abs=8)
    assert alone[0] == 0
    assert alone[1] >= 0.95 * both.total()  # the server's whole time is theirs now


def test_an_environment_that_only_one_server_cannot_reach_is_run_by_the_others():
    coordinator = two_environments(max_staleness=8)
    granted = join(coordinator, "s", groups=2)
    lost = granted[0]
    fail(coordinator, lost, now=1.0)
    elsewhere = join(coordinator, "t", groups=8, now=1.0)
    assert lost.task_id in [grant.task_id for grant in elsewhere]
    assert set(environments_of(coordinator, elsewhere)) == {0, 1}


def test_everybody_is_told_which_environment_is_down_and_why():
    coordinator = a_coordinator(groups_per_step=1, max_staleness=0)
    [grant] = join(coordinator, "s", groups=1)
    fail(coordinator, grant, now=1.0)
    expected = "environment the environment, down as seen from server s, tried again in 1 s: connection refused"
    assert what_a_server_waits_for(coordinator, "s", 1.0) == expected
    assert what_the_learner_waits_for(coordinator, 1.0, listen_address="tcp://x") == expected


def test_no_more_tasks_wait_than_a_checkpoint_can_hold_and_then_the_run_waits_for_the_environment():
    ledger = TaskLedger(max_failures=1, max_losses=1, mix=Mix((1.0, 1.0)))
    handed_out = 0
    while ledger.next(lambda environment: environment == 1) is not None:
        handed_out += 1
    assert ledger.num_waiting == MAX_WAITING_TASKS + 1
    assert handed_out in (MAX_WAITING_TASKS, MAX_WAITING_TASKS + 1)
    assert repr(ledger).endswith(f"{MAX_WAITING_TASKS + 1} waiting for their environment>")
    assert ledger.next() == 0  # it is up again: the oldest task first
    assert ledger.next(lambda environment: False) is None


def test_waiting_tasks_are_in_a_checkpoint_and_leased_after_a_resume():
    coordinator = two_environments(max_staleness=2)
    granted = join(coordinator, "s", groups=4)
    for grant in granted:
        fail(coordinator, grant, now=1.0) if grant.task_id % 2 == 0 else None
    resumed = Coordinator(coordinator.settings, frontier=coordinator.frontier())
    resumed.published(0, now=0.0)
    handed_out = {grant.task_id for grant in join(resumed, "s", groups=50)}
    assert {grant.task_id for grant in granted} <= handed_out
