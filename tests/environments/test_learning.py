"""A small policy learns a reasoning-gym task from a real OpenEnv server, and nothing from a random reward."""

import asyncio
from pathlib import Path
from statistics import fmean

import pytest

from common.lifecycle import ChildProcess
from tests.environments.__main__ import HERE
from tests.environments.servers import a_free_port, running

pytestmark = pytest.mark.environments

TIMEOUT_S = 900
CONFIG = """
[learner]
total_steps = 50
groups_per_step = 16
group_size = 16
max_staleness = 2
max_new_tokens = 6
max_model_len = 32
learning_rate = 5e-4
data = "python:tests.environments.divisors:rows"
run_dir = "{run_dir}"
[learner.environment.divisors]
url = "openenv+ws://127.0.0.1:{port}"
format_observation = "tests.environments.divisors:numbers_alone"
[rollout_server]
max_sequences = 256
kv_cache_gib = 0.0625
"""


async def true_scores(tmp_path: Path, *flags: str) -> list[float]:
    """The score of every answer, in order."""
    port = a_free_port()
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(run_dir=tmp_path / "run", port=port))
    script, scores = HERE / "learning_server.py", tmp_path / "scores"
    async with (
        asyncio.timeout(TIMEOUT_S),
        running("openenv-0.10", script, "--scores", str(scores), *flags, port=port),
        ChildProcess.run_module("deploy", "up", str(config), output=tmp_path / "log.txt") as run,
    ):
        assert await run.wait() == 0, (tmp_path / "log.txt").read_text()[-3000:]
    return [float(line) for line in scores.read_text().splitlines()]


@pytest.mark.timeout(TIMEOUT_S)
async def test_the_policy_learns_from_the_servers_reward(tmp_path):
    scores = await true_scores(tmp_path)
    assert fmean(scores[-2000:]) > fmean(scores[:2000]) + 0.3


@pytest.mark.timeout(TIMEOUT_S)
async def test_the_policy_does_not_learn_from_a_random_reward(tmp_path):
    scores = await true_scores(tmp_path, "--random-reward")
    assert fmean(scores[-2000:]) < fmean(scores[:2000]) + 0.1
