"""A run that is evaluated while it trains: real processes and sockets, with a table policy for the model."""

import asyncio
from collections import Counter

import pytest

from common.events import read_events
from tests.storm.fleet import Fleet

STEPS, EVERY, TASKS, SAMPLES = 60, 20, 12, 4
FLAGS = (
    "--groups-per-step", 4, "--group-size", 4, "--total-steps", STEPS, "--checkpoint-every-steps", 25,
    "--learning-rate", 0.4, "--evaluate-every-steps", EVERY, "--evaluation-tasks", TASKS,
    "--evaluation-samples", SAMPLES, "--evaluation-temperature", 1.0, "--evaluation-pass-reward", 0.5,
)  # fmt: skip
TIMEOUT_S = 90.0


async def run(directory, *flags, servers=1, **how):
    fleet = Fleet(directory, (*FLAGS, *flags), servers=servers, **how)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await fleet.run()
    finally:
        fleet.kill_all()
    return read_events(sorted((directory / "run").glob("events-learner-*.jsonl")))


@pytest.mark.timeout(150)
@pytest.mark.parametrize("max_staleness", [pytest.param(0, marks=pytest.mark.slow), 2])
async def test_every_twenty_versions_held_out_tasks_are_evaluated_with_that_version_alone(tmp_path, max_staleness):
    events = await run(tmp_path, "--max-staleness", max_staleness, reward="recorded_reward")
    evaluations = [event for event in events if event["kind"] == "evaluation"]
    assert [event["asked_version"] for event in evaluations] == [0, 20, 40, 60]
    for event in evaluations:
        assert event["complete"], event
        assert (event["tasks"], event["samples"], event["unfinished"]) == (TASKS, SAMPLES, 0)
        assert event["version"] >= event["asked_version"]
        assert 0 <= event["pass_at_1"] <= event["pass_at_2"] <= event["pass_at_4"] <= 1
    assert evaluations[-1]["version"] == STEPS  # the run ends only after that
    assert evaluations[-1]["reward"] > evaluations[0]["reward"] + 0.1  # it has learned
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    # The first of the 100 prompts are held out: they were answered for evaluations alone.
    answered = Counter((tmp_path / "answered.txt").read_text().split())
    assert len(answered) == 100
    held_out = {answered[f"{number}="] for number in range(TASKS)}
    assert held_out == {SAMPLES * len(evaluations)}
    assert "evaluation of version 60: mean reward" in (tmp_path / "learner.log").read_text()


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_without_servers_a_run_ends_all_the_same_and_says_that_its_last_version_is_not_evaluated(tmp_path):
    flags = ("--max-staleness", 2, "--evaluation-timeout-s", 3)
    await run(tmp_path, *flags)
    events = await run(tmp_path, *flags, servers=0)  # resumed when every step is taken: only the evaluation is left
    last = [event for event in events if event["kind"] == "evaluation"][-1]
    assert (last["asked_version"], last["complete"], last["reason"]) == (STEPS, False, "it was not done within 3 s")
    assert (tmp_path / "learner.log").read_text().count("finished; the policy is in") == 2
