"""The reward rises because the policy learns: with a reward that has nothing to do with the answer it does not."""

import asyncio
from pathlib import Path
from statistics import fmean

import pytest

from common.events import read_events
from common.lifecycle import ChildProcess
from deploy.report import summarize

TIMEOUT_S = 600
STEPS = 200


async def rewards_of(run_dir: Path, *flags: str) -> list[float]:
    run_dir.mkdir()
    arguments = ("--run-dir", str(run_dir), "--total-steps", str(STEPS), *flags)
    async with ChildProcess.run_module("deploy.quickstart", *arguments, output=run_dir / "log.txt") as run:
        async with asyncio.timeout(TIMEOUT_S):
            assert await run.wait() == 0, (run_dir / "log.txt").read_text()[-2000:]
    events = read_events(run_dir.glob("events-learner-*.jsonl"))
    return [event["reward"] for event in events if event["kind"] == "step"]


@pytest.mark.slow
async def test_reward_and_held_out_accuracy_rise_with_the_true_reward(tmp_path: Path):
    rewards = await rewards_of(tmp_path / "run")
    assert fmean(rewards[-20:]) > fmean(rewards[:20]) + 0.4
    before, after = (event["accuracy"] for event in summarize(tmp_path / "run").evaluations)
    assert after > before + 0.3


CRITICS = {
    "a network of its own": ("--advantage", "gae", "--critic-learning-rate", "1e-3"),
    "a value head": ("--advantage", "gae", "--critic", "value_head"),
}


@pytest.mark.slow
@pytest.mark.parametrize("critic", CRITICS)
async def test_with_a_critic_the_reward_rises_too(tmp_path: Path, critic):
    rewards = await rewards_of(tmp_path / "run", *CRITICS[critic])
    assert fmean(rewards[-20:]) > fmean(rewards[:20]) + 0.4


@pytest.mark.slow
async def test_with_reinforce_plus_plus_the_reward_rises_too(tmp_path: Path):
    rewards = await rewards_of(tmp_path / "run", "--advantage", "reinforce_plus_plus")
    assert fmean(rewards[-20:]) > fmean(rewards[:20]) + 0.4


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), CRITICS["a value head"]], ids=["grpo", "a value head"])
async def test_the_true_score_does_not_rise_under_a_shuffled_reward(tmp_path: Path, flags):
    control = ("--environment", "python:learner.demo.task:shuffled_reward")
    await rewards_of(tmp_path / "run", *control, *flags)
    before, after = (event["accuracy"] for event in summarize(tmp_path / "run").evaluations)
    assert after < before + 0.05
