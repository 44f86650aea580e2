"""Processes that are stopped or killed in the middle of a run, and what the others make of it."""

import re
import signal
import time
from itertools import pairwise

import pytest

from tests.system.processes import LEARNER, Command, Stage

pytestmark = pytest.mark.timeout(300)

STEPS = 24
SLOW = ("--environment", "python:tests.system.rewards:slow", "--no-tensorboard", "--max-staleness", "1")


def a_long_run(model: str) -> tuple[str, ...]:
    often = ("--checkpoint-every-steps", "5", "--server-timeout-s", "2")
    return (*LEARNER, *SLOW, *often, "--total-steps", str(STEPS), "--model", model)


def current_checkpoint(stage: Stage) -> int:
    return int((stage.path / "run/checkpoints/CURRENT").read_text().strip().removeprefix("step-"))


def versions_by_lineage(server: Command) -> dict[str, list[int]]:
    """Versions a rollout server loaded, by the run and life of the run it had joined then."""
    versions: dict[str, list[int]] = {}
    lineage = ""
    for match in re.finditer(r"joined run (\S+)|at version (\d+),", server.log):
        if match[1] is not None:
            lineage = match[1]
        else:
            versions.setdefault(lineage, []).append(int(match[2]))
    return versions


async def test_a_learner_stopped_by_sigterm_ends_at_once_and_resumes_with_the_same_server(
    stage: Stage, demo_model: str
):
    learner = await stage.start(*a_long_run(demo_model))
    server = await stage.start(*await learner.join_command())
    await stage.reaches(learner, 6)
    sent_s = time.monotonic()
    learner.send_signal(signal.SIGTERM)
    assert await learner.exit_code() == 128 + signal.SIGTERM
    assert time.monotonic() - sent_s < 5
    stopped_at = stage.steps()[-1]
    assert current_checkpoint(stage) == stopped_at < STEPS

    await server.says("waiting for the learner at tcp://.*nothing heard of it")
    again = await stage.start(*a_long_run(demo_model))
    assert await again.join_command() == await learner.join_command()
    await again.says(f"resuming at version {stopped_at}")
    for command in (again, server):
        assert await command.exit_code() == 0, repr(command)
    assert stage.steps(1) + stage.steps(2) == list(range(1, STEPS + 1))
    loaded = versions_by_lineage(server)
    assert [run[-2:] for run in loaded] == [".1", ".2"]
    assert all(earlier < later for versions in loaded.values() for earlier, later in pairwise(versions))
    assert await stage.has_no()


async def test_a_killed_server_is_replaced_and_a_killed_learner_takes_its_children_along_and_resumes(
    stage: Stage, demo_model: str
):
    learner = await stage.start(*a_long_run(demo_model))
    words = await learner.join_command()
    killed = await stage.start(*words, "--name", "first")
    await stage.reaches(learner, 3)
    killed.send_signal(signal.SIGKILL)
    assert await killed.exit_code() == -signal.SIGKILL
    before = stage.steps()[-1]
    server = await stage.start(*words, "--name", "second")
    await stage.reaches(learner, max(before + 4, 8))

    learner.send_signal(signal.SIGKILL)
    assert await learner.exit_code() == -signal.SIGKILL
    resumed_at = current_checkpoint(stage)
    assert 5 <= resumed_at <= stage.steps()[-1]
    assert await stage.has_no("learner.coordinator")
    assert await stage.has_no("learner.snapshot_server")
    again = await stage.start(*a_long_run(demo_model))
    await again.says(f"resuming at version {resumed_at}")
    for command in (again, server):
        assert await command.exit_code() == 0, repr(command)
    assert stage.steps(1) == list(range(1, len(stage.steps(1)) + 1))
    assert stage.steps(2) == list(range(resumed_at + 1, STEPS + 1))
    loaded = versions_by_lineage(server)
    assert all(earlier < later for versions in loaded.values() for earlier, later in pairwise(versions))
    assert await stage.has_no()
