import asyncio
from contextlib import nullcontext

import pytest

from common.messages import EvaluatedEpisode
from learner.config import LearnerConfig
from learner.coordinator.messages import EvaluatedTask, EvaluationReport
from learner.evaluations import Evaluations, Schedule

PATIENCE_S = 10.0


def due(versions, **settings):
    schedule = Schedule(**({"every": 10, "first_version": 0, "last_version": 1000} | settings))
    return [version for version in versions if schedule.is_due(version)]


def test_every_so_many_versions_one_is_due_and_so_are_the_first_and_the_last():
    assert due(range(36), last_version=35) == [0, 10, 20, 30, 35]


def test_where_versions_are_not_published_the_next_one_is_due():
    assert due([0, 4, 9, 13, 19, 31, 32, 39, 40]) == [0, 13, 31, 40]


def test_a_resumed_run_evaluates_the_version_it_begins_with_where_that_is_due():
    assert due(range(17, 24), first_version=17) == [20]
    assert due(range(20, 24), first_version=20) == [20]


def test_a_version_is_due_once():
    assert due([10, 10, 9, 10], first_version=10) == [10]


class FakeCoordinator:
    """Answers when it is told to."""

    def __init__(self):
        self.asked = []
        self.answers = asyncio.Queue()
        self.heard = asyncio.Event()

    async def evaluate(self, version):
        self.asked.append(version)
        self.heard.set()
        return await self.answers.get()

    async def is_asked(self):
        async with asyncio.timeout(PATIENCE_S):
            await self.heard.wait()
        self.heard.clear()


class FakeLog(list):
    """Events and scalars, in one list."""

    def emit(self, kind, **fields):
        self.append((kind, fields))

    def interval(self, kind, **fields):
        del kind
        return nullcontext(fields)

    def log(self, step, scalars):
        self.append(("scalars", {"step": step, **scalars}))


def a_report(version=10, *, asked=10, unfinished=0):
    episode = EvaluatedEpisode(
        reward=1.0, num_tokens=3, terminated=True, oldest_version=version, newest_version=version
    )
    return EvaluationReport(
        asked_version=asked, version=version, tasks=(EvaluatedTask(task_id=0, episodes=(episode,)),), failed={},
        unfinished=unfinished, reason="too slow" if unfinished else "",
    )  # fmt: skip


@pytest.fixture
def log():
    return FakeLog()


@pytest.fixture
def coordinator():
    return FakeCoordinator()


def evaluations(coordinator, log, **changes):
    config = LearnerConfig(evaluate_every_steps=10, **changes)
    return Evaluations(config.evaluation_settings, coordinator, log, [log], first_version=0, last_version=35)


async def test_a_result_is_told_to_events_and_trackers_under_the_version_that_was_evaluated(coordinator, log):
    subject = evaluations(coordinator, log)
    running = asyncio.ensure_future(subject.run())
    await subject.published(10)
    await coordinator.is_asked()
    assert coordinator.asked == [10]
    coordinator.answers.put_nowait(a_report(version=11))
    await coordinator_is_done(subject)
    events = dict(log)
    assert (events["evaluation"]["version"], events["evaluation"]["asked_version"]) == (11, 10)
    assert events["evaluation"]["reward"] == 1.0
    assert events["scalars"]["step"] == 11
    assert events["scalars"]["evaluation/pass_at_1"] == 1.0
    measured = {one.name: one.value for one in subject.measure()}
    assert (measured["evaluation_version"], measured["evaluation_reward"]) == (11, 1.0)
    running.cancel()


async def coordinator_is_done(subject):
    async with asyncio.timeout(PATIENCE_S), subject._changed:
        await subject._changed.wait_for(lambda: subject._due is None and not subject._is_running)


async def test_of_versions_that_are_due_while_one_is_evaluated_the_newest_is_next(coordinator, log):
    subject = evaluations(coordinator, log)
    running = asyncio.ensure_future(subject.run())
    await subject.published(0)
    await coordinator.is_asked()
    for version in (10, 20, 30):
        await subject.published(version)
    coordinator.answers.put_nowait(a_report(0, asked=0))
    await coordinator.is_asked()
    assert (coordinator.asked, subject.skipped) == ([0, 30], 2)
    running.cancel()


async def test_the_end_waits_for_the_last_version_to_be_evaluated(coordinator, log):
    subject = evaluations(coordinator, log)
    running = asyncio.ensure_future(subject.run())
    end = asyncio.ensure_future(subject.finish(35))
    await coordinator.is_asked()
    assert coordinator.asked == [35]
    assert not end.done()
    coordinator.answers.put_nowait(a_report(35, asked=35))
    async with asyncio.timeout(PATIENCE_S):
        await end
    running.cancel()


async def test_the_end_does_not_wait_longer_than_the_time_out(coordinator, log, monkeypatch, caplog):
    monkeypatch.setattr("learner.evaluations.GRACE_S", 0.01)
    subject = evaluations(coordinator, log, evaluation_timeout_s=0.05)
    running = asyncio.ensure_future(subject.run())
    async with asyncio.timeout(PATIENCE_S):
        await subject.finish(35)
    assert "the last evaluation was not done within 0.05 s" in caplog.text
    running.cancel()


async def test_an_evaluation_that_was_given_up_has_no_numbers_and_says_why(coordinator, log, caplog):
    subject = evaluations(coordinator, log)
    running = asyncio.ensure_future(subject.run())
    await subject.published(10)
    coordinator.answers.put_nowait(a_report(unfinished=1))
    await coordinator.is_asked()
    await coordinator_is_done(subject)
    assert "evaluation of version 10 was given up: too slow; raise evaluation_hold_s" in caplog.text
    events = dict(log)
    assert events["evaluation"]["complete"] is False
    assert "reward" not in events["evaluation"]
    assert "scalars" not in events
    assert [one.name for one in subject.measure()] == ["evaluations_given_up_total", "evaluations_skipped_total"]
    running.cancel()
