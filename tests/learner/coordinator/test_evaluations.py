"""Evaluations of one version, beside training and never in its way."""

import pytest

from common.messages import EvaluatedEpisode
from learner.coordinator.decisions import GrantEvaluation, HoldFor, Quarantine, ReportEvaluation
from learner.coordinator.delivery import LearnerError
from learner.coordinator.settings import EvaluationRules
from tests.builders_coordinator import a_coordinator, grants, group_for, join, of_kind, publishes

ANY_LATER = (1 << 31) - 1


def an_evaluating_coordinator(*, num_tasks=4, samples=1, group_size=1, **overrides):
    rules = EvaluationRules(num_tasks=num_tasks, samples=samples, group_size=group_size, timeout_s=100.0)
    return a_coordinator(evaluation=rules, **overrides)


def holds(coordinator, server_id="a", *, version=0, now=1.0):
    """The server says that it stays at the version."""
    return coordinator.heartbeat(server_id, progress=0, loaded_version=version, holding=version, now=now)


def evaluations(decisions):
    return of_kind(decisions, GrantEvaluation)


def some_episodes(version=0, *, number=1, reward=1.0):
    episode = EvaluatedEpisode(
        reward=reward, num_tokens=3, terminated=True, oldest_version=version, newest_version=version
    )
    return (episode,) * number


def does(coordinator, grant, *, now=1.0, episodes=None, version=None):
    version = grant.version if version is None else version
    return coordinator.evaluation_finished(
        grant.server_id, grant.evaluation_id, task_id=grant.task_id, version=version,
        episodes=some_episodes(grant.version) if episodes is None else episodes, now=now,
    )  # fmt: skip


def does_all(coordinator, granted, *, now=1.0):
    """The tasks, and those that are granted in their place; returns the report."""
    todo = list(granted)
    while todo:
        decisions = does(coordinator, todo.pop(0), now=now)
        todo += evaluations(decisions)
        if reports := of_kind(decisions, ReportEvaluation):
            return reports[0]
    raise AssertionError("nothing was reported")


def test_an_evaluation_begins_with_the_version_that_the_first_server_holds_and_then_asks_for_that_one():
    coordinator = an_evaluating_coordinator()
    join(coordinator, groups=16)
    assert of_kind(coordinator.evaluate(0, now=1.0), HoldFor) == [HoldFor(first=0, last=ANY_LATER)]
    decisions = holds(coordinator)
    assert of_kind(decisions, HoldFor) == [HoldFor(first=0, last=0)]
    assert [(grant.task_id, grant.version) for grant in evaluations(decisions)] == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_every_task_done_is_an_evaluation_done_and_the_servers_may_go_on():
    coordinator = an_evaluating_coordinator()
    join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    *first, last = evaluations(holds(coordinator))
    for grant in first:
        assert of_kind(does(coordinator, grant), ReportEvaluation) == []
    decisions = does(coordinator, last)
    [report] = of_kind(decisions, ReportEvaluation)
    assert (report.asked_version, report.version, report.failed, report.unfinished) == (0, 0, {}, 0)
    assert sorted(report.results) == [0, 1, 2, 3]
    assert of_kind(decisions, HoldFor) == [HoldFor(first=0, last=-1)]
    assert repr(coordinator.evaluations) == "<Evaluations none>"


def test_an_evaluation_changes_nothing_about_the_leases_of_training():
    alone, beside = a_coordinator(groups_per_step=4), an_evaluating_coordinator(groups_per_step=4)
    beside.evaluate(0, now=0.0)
    granted = []
    for coordinator in (alone, beside):
        first = join(coordinator, groups=4)
        decisions = holds(coordinator)
        more = [grants(coordinator.group_finished("a", group_for(grant), now=9.0)) for grant in first]
        granted.append((first, grants(decisions), more, coordinator.counts()))
        coordinator.frontier()
    assert granted[0] == granted[1]


def test_while_the_version_is_the_newest_an_evaluation_takes_only_the_room_that_training_leaves():
    coordinator = an_evaluating_coordinator(groups_per_step=4, max_staleness=0)
    coordinator.evaluate(0, now=1.0)
    first = join(coordinator, groups=4)
    assert len(first) == 4
    assert evaluations(holds(coordinator)) == []
    assert len(evaluations(coordinator.group_finished("a", group_for(first[0]), now=1.5))) == 1


def test_an_evaluation_does_not_starve_where_training_leaves_no_room():
    coordinator = an_evaluating_coordinator(groups_per_step=4, max_staleness=0)
    coordinator.evaluate(0, now=1.0)
    join(coordinator, groups=4)
    holds(coordinator)
    assert evaluations(coordinator.tick(now=2.9)) == []
    assert len(evaluations(coordinator.tick(now=3.1))) == 2  # half of the server


def test_once_a_newer_version_is_out_the_hold_costs_and_the_tasks_are_granted_at_once():
    coordinator = an_evaluating_coordinator(groups_per_step=4, max_staleness=1)
    coordinator.evaluate(0, now=1.0)
    first = join(coordinator, groups=4)
    assert evaluations(holds(coordinator)) == []
    coordinator.take_batch(0, now=1.0)
    for grant in first:
        coordinator.group_finished("a", group_for(grant), now=1.0)
    coordinator.step_completed(1, tuple(grant.lease_id for grant in first), now=1.1)
    assert len(evaluations(coordinator.published(1, now=1.1))) == 2


@pytest.mark.parametrize(("capacity", "samples", "group_size", "at_once"), [(8, 1, 4, 16), (8, 4, 4, 4), (1, 9, 4, 1)])
def test_an_evaluation_takes_half_of_a_server_at_most_counted_in_episodes(capacity, samples, group_size, at_once):
    coordinator = an_evaluating_coordinator(num_tasks=50, samples=samples, group_size=group_size, groups_per_step=1)
    join(coordinator, groups=capacity)
    coordinator.evaluate(0, now=1.0)
    granted = evaluations(holds(coordinator)) + evaluations(coordinator.tick(now=3.2))
    assert len(granted) == at_once


def test_servers_that_hold_the_same_version_share_the_tasks():
    coordinator = an_evaluating_coordinator()
    for name in ("a", "b", "c"):
        join(coordinator, name, groups=16)
    coordinator.evaluate(0, now=1.0)
    coordinator.heartbeat("c", progress=0, loaded_version=0, now=1.0)  # does not hold it
    for name in ("a", "b"):
        coordinator.members[name].holding = 0
    assert [grant.server_id for grant in evaluations(coordinator.tick(now=1.0))] == ["a", "b", "a", "b"]


def begun_at_two_servers():
    coordinator = an_evaluating_coordinator()
    for name in ("a", "b"):
        join(coordinator, name, groups=16)
        coordinator.members[name].holding = 0
    return coordinator, evaluations(coordinator.evaluate(0, now=1.0))


LOSSES = {
    "lost": lambda coordinator: coordinator.server_lost("a", "silent", now=1.0),
    "left": lambda coordinator: coordinator.server_left("a", "SIGTERM", now=1.0),
    "out of service": lambda coordinator: coordinator.heartbeat(
        "a", progress=0, loaded_version=0, holding=0, out_of_service="canary", now=1.0
    ),
    "ready again": lambda coordinator: coordinator.server_ready(
        "a", capacity_groups=16, capacity_bytes=1 << 30, now=1.0
    ),
}


@pytest.mark.parametrize("how", LOSSES)
def test_what_a_server_had_is_done_again_when_it_is_lost_and_what_it_says_later_is_ignored(how):
    coordinator, granted = begun_at_two_servers()
    had = {grant.task_id for grant in granted if grant.server_id == "a"}
    again = evaluations(LOSSES[how](coordinator))
    assert {grant.task_id for grant in again} == had
    for grant in granted:
        if grant.server_id == "a":
            assert of_kind(does(coordinator, grant), ReportEvaluation) == []
    report = does_all(coordinator, [grant for grant in granted if grant.server_id == "b"] + again)
    assert sorted(report.results) == [0, 1, 2, 3]


def test_a_server_that_joins_is_told_what_to_hold():
    coordinator = an_evaluating_coordinator()
    coordinator.evaluate(0, now=1.0)
    decisions = coordinator.server_ready("a", capacity_groups=4, capacity_bytes=1 << 30, now=1.0)
    assert of_kind(decisions, HoldFor) == [HoldFor(first=0, last=ANY_LATER, server_id="a")]


def test_when_nobody_holds_the_version_any_more_everything_begins_anew_with_the_next_one():
    coordinator = an_evaluating_coordinator(groups_per_step=1)
    [lease, *_] = join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    first, *others = evaluations(holds(coordinator))
    does(coordinator, first)
    coordinator.take_batch(0, now=1.0)
    coordinator.group_finished("a", group_for(lease), now=1.0)
    coordinator.step_completed(1, (lease.lease_id,), now=1.0)
    publishes(coordinator, 1)  # the server's time to hold was up
    for grant in others:
        decisions = coordinator.evaluation_failed("a", grant.evaluation_id, "version_gone", now=1.0)
    assert of_kind(decisions, HoldFor) == [HoldFor(first=0, last=ANY_LATER)]
    again = evaluations(holds(coordinator, version=1))
    assert [(grant.task_id, grant.version) for grant in again] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    report = does_all(coordinator, again)
    assert (report.asked_version, report.version) == (0, 1)
    tokens = {episode.oldest_version for episodes in report.results.values() for episode in episodes}
    assert tokens == {1}


def test_an_evaluation_that_no_server_ever_completes_is_given_up_and_says_why():
    coordinator = an_evaluating_coordinator()
    join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    for _ in range(3):
        for grant in evaluations(holds(coordinator)):
            decisions = coordinator.evaluation_failed("a", grant.evaluation_id, "version_gone", now=1.0)
    [report] = of_kind(decisions, ReportEvaluation)
    assert (report.unfinished, report.reason) == (4, "servers had newer versions before it was done, 3 times")


def test_what_is_done_of_a_version_that_is_gone_is_not_reported():
    coordinator = an_evaluating_coordinator()
    join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    first, *others = evaluations(holds(coordinator))
    does(coordinator, first)
    for grant in others:
        coordinator.evaluation_failed("a", grant.evaluation_id, "version_gone", now=1.0)
    [report] = of_kind(coordinator.tick(now=101.0), ReportEvaluation)
    assert (report.version, report.results, report.unfinished) == (-1, {}, 4)


def test_without_servers_an_evaluation_ends_by_its_time_out():
    coordinator = an_evaluating_coordinator()
    coordinator.evaluate(0, now=1.0)
    assert of_kind(coordinator.tick(now=100.9), ReportEvaluation) == []
    [report] = of_kind(coordinator.tick(now=101.0), ReportEvaluation)
    assert (report.version, report.unfinished, report.reason) == (-1, 4, "it was not done within 100 s")


def test_a_task_that_fails_three_times_is_left_out_and_counted():
    coordinator = an_evaluating_coordinator(num_tasks=2)
    join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    good, bad = evaluations(holds(coordinator))
    for _ in range(2):
        decisions = coordinator.evaluation_failed("a", bad.evaluation_id, "environment_error", now=1.0)
        [bad] = evaluations(decisions)
        assert bad.task_id == 1
    coordinator.evaluation_failed("a", bad.evaluation_id, "environment_error", now=1.0)
    [report] = of_kind(does(coordinator, good), ReportEvaluation)
    assert (sorted(report.results), report.failed, report.unfinished) == ([0], {"environment_error": 1}, 0)


BAD_RESULTS = {
    "tokens of a newer version": {"episodes": (EvaluatedEpisode(
        reward=1.0, num_tokens=1, terminated=True, oldest_version=0, newest_version=1
    ),)},
    "tokens of an older version": {"episodes": (EvaluatedEpisode(
        reward=1.0, num_tokens=1, terminated=True, oldest_version=0, newest_version=0
    ),), "at": 1},
    "too many episodes": {"episodes": some_episodes(number=2)},
    "another version": {"version": 7},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_RESULTS)
def test_a_result_that_is_not_wholly_of_the_version_is_not_taken_and_its_server_is_blamed(what):
    change = dict(BAD_RESULTS[what])
    version = change.pop("at", 0)
    coordinator = an_evaluating_coordinator(num_tasks=1, max_offences=1)
    coordinator.book.version = coordinator.book.published_version = version
    join(coordinator, groups=16)
    coordinator.evaluate(version, now=1.0)
    [grant] = evaluations(holds(coordinator, version=version))
    decisions = does(coordinator, grant, **change)
    assert of_kind(decisions, ReportEvaluation) == []
    assert len(of_kind(decisions, Quarantine)) == 1


def test_a_version_that_is_not_published_is_not_believed_to_be_held():
    coordinator = an_evaluating_coordinator()
    join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    assert evaluations(holds(coordinator, version=5)) == []


def test_asked_again_an_evaluation_goes_on_and_another_one_replaces_it():
    coordinator = an_evaluating_coordinator()
    join(coordinator, groups=16)
    coordinator.evaluate(0, now=1.0)
    [first, *_] = evaluations(holds(coordinator))
    assert coordinator.evaluate(0, now=1.0) == []
    coordinator.book.version = 1
    decisions = coordinator.evaluate(1, now=1.0)
    assert of_kind(decisions, HoldFor) == [HoldFor(first=1, last=ANY_LATER)]
    does(coordinator, first)
    assert repr(coordinator.evaluations) == "<Evaluations version 1 or later, 0/4 tasks done, 0 running>"


def test_a_run_that_has_no_evaluations_cannot_be_asked_for_one():
    with pytest.raises(LearnerError, match="in a run that has none"):
        a_coordinator().evaluate(0, now=0.0)


def test_a_closed_run_grants_no_evaluation_tasks():
    coordinator = an_evaluating_coordinator()
    coordinator.evaluate(0, now=1.0)
    coordinator.close("done")
    join(coordinator, groups=16)
    assert evaluations(holds(coordinator)) == []


@pytest.mark.parametrize("name", ["num_tasks", "samples", "group_size", "max_begun", "max_task_failures"])
def test_rules_of_an_evaluation_are_positive(name):
    values = {"num_tasks": 1, "samples": 1, "group_size": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} of an evaluation must be >= 1, got 0"):
        EvaluationRules(**values)
