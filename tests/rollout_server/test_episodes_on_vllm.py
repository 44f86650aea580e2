"""Episodes of several turns on the real engine: every log-probability is that of the very ids and weights it claims."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from common.environments import EnvironmentSettings
from common.staleness import NOT_SAMPLED
from rollout_server.environments.environment import StepResult
from rollout_server.episodes import EpisodeRunner
from tests.models import forward_logprobs
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine
from tests.rollout_server.test_episodes import ScriptedEnvironment, a_lease, at_once

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOLERANCE = 1e-4


async def test_turns_before_and_after_a_weight_update_have_the_log_probabilities_of_one_forward_over_all_ids(
    live: LiveEngine,
):
    await live.load_next()
    first_version = live.engine.loaded_version
    updates = 0

    async def update() -> None:
        nonlocal updates
        if updates == 0:
            updates += 1
            await live.load_next()

    more = [StepResult(reward=0.25, done=False, observation=f" w{20 + turn} w30 w31") for turn in range(20)]
    environment = ScriptedEnvironment(*more, step=update, settings=EnvironmentSettings(max_turns=20))
    words = PreTrainedTokenizerFast.from_pretrained(live.directory / "model")
    runner = EpisodeRunner(
        live.engine, {environment.url: environment}, words, temperature=1.0,
        max_new_tokens=150, max_model_len=MAX_MODEL_LEN, wait_for_version=at_once,
    )  # fmt: skip
    lease = a_lease(row=json.dumps({"prompt": "w7 w8 w9"}).encode(), group_size=16, min_version=first_version)
    trajectories = (await runner.run(lease)).trajectories
    assert max(trajectory.turns for trajectory in trajectories) >= 2
    assert any(len(trajectory.version_runs()) == 2 for trajectory in trajectories)
    for trajectory in trajectories:
        np.testing.assert_array_equal(trajectory.token_versions != NOT_SAMPLED, trajectory.loss_mask)
        for version, _ in trajectory.version_runs():
            expected = forward_logprobs(live.models[version], trajectory.token_ids, temperature=1.0)
            of_version = trajectory.token_versions == version
            error = np.abs(expected - trajectory.behavior_logprobs[1:])[of_version[1:]]
            assert error.max() < TOLERANCE
