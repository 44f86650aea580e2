"""verifiers+tcp against the environment server of verifiers 0.4.0, in a process of its own."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from common.environments import EnvironmentSettings
from common.staleness import NOT_SAMPLED
from rollout_server.environments import environment_at
from rollout_server.gateway.gateway import Gateway, GatewaySettings
from rollout_server.lease_failure import LeaseFailure
from tests.environments.__main__ import HERE
from tests.environments.servers import a_free_port, answers_verifiers, running
from tests.models import forward_logprobs
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine, live_engine
from tests.rollout_server.gateway.builders_gateway import a_runner, episode_of, sampled_text
from tests.rollout_server.gateway.test_gateway_on_vllm import TOLERANCE, words
from tests.rollout_server.test_episodes import a_lease

pytestmark = pytest.mark.environments

NAME = "verifiers"
SERVER = HERE / "verifiers_server.py"


def a_row(does: str = "reward 1", **fields: Any) -> dict[str, Any]:
    """Of a lease: what the task of verifiers_tasks.py does when its agent is done."""
    return {"row": json.dumps({"prompt": "2+3", "does": does} | fields).encode()}


@asynccontextmanager
async def playing(*flags: str, port: int = 0, **settings: Any) -> AsyncIterator[tuple[Any, Any, Any]]:
    """(environment, gateway, the server's process)"""
    port = port or a_free_port()
    settings = {"capacity_timeout_s": 240.0} | settings  # a pool answers before its workers can
    async with (
        running(NAME, SERVER, *flags, port=port, answers=answers_verifiers) as process,
        environment_at(f"verifiers+tcp://127.0.0.1:{port}", EnvironmentSettings(**settings)) as environment,
        Gateway(GatewaySettings()) as gateway,
    ):
        yield environment, gateway, process


async def failure_of(environment: Any, gateway: Any, *texts: str, **row: Any) -> tuple[str, str]:
    with pytest.raises(LeaseFailure) as caught:
        await episode_of(environment, gateway, *texts or ("5",), lease=a_row(**row))
    return caught.value.kind, caught.value.reason


@pytest.mark.timeout(240)
@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["one process", "a pool"])
async def test_each_of_many_episodes_has_the_tokens_and_the_reward_of_its_own_task(flags):
    async def episode(number: int) -> None:
        lease = a_row(f"reward {number}", turns=1 + number % 3)
        texts = [f"{number}.{turn}" for turn in range(1 + number % 3)]
        [trajectory] = await episode_of(environment, gateway, *texts, lease=lease)
        assert trajectory.reward == number
        assert sampled_text(trajectory) == "".join(f"{text}<|im_end|>" for text in texts)

    async with playing(*flags, max_concurrent=8) as (environment, gateway, _):
        await asyncio.gather(*(episode(number) for number in range(24)))
        assert "0 sessions" in repr(gateway)
        assert " 0 requests, 0 answers to nothing" in repr(environment)


async def test_what_the_real_server_says_of_rewards_that_are_none_is_never_a_reward():
    async with playing() as (environment, gateway, _):
        for does in ("nan", "infinity", "huge"):
            kind, reason = await failure_of(environment, gateway, does=does)
            assert kind == "bad_reward", reason
        kind, reason = await failure_of(environment, gateway, does="raise boom")
        assert (kind, "boom" in reason) == ("environment_error", True)
        kind, reason = await failure_of(environment, gateway, turns="many")
        assert (kind, "turns" in reason) == ("bad_row", True)
        assert len(await episode_of(environment, gateway, "5", lease=a_row())) == 1


async def test_a_run_that_hangs_is_cancelled_at_its_deadline_and_a_gateway_that_refuses_is_no_reward():
    async with playing(episode_timeout_s=3, max_turns=2) as (environment, gateway, _):
        assert (await failure_of(environment, gateway, does="hang"))[0] == "environment_timeout"
        kind, _ = await failure_of(environment, gateway, "1", "2", "3", turns=3)
        assert kind == "environment_error"
        assert len(await episode_of(environment, gateway, "5", lease=a_row())) == 1


async def test_a_server_that_is_killed_in_the_middle_fails_the_episode_and_the_next_one_is_well():
    port = a_free_port()
    url = f"verifiers+tcp://127.0.0.1:{port}"
    async with environment_at(url, EnvironmentSettings()) as environment, Gateway(GatewaySettings()) as gateway:
        async with running(NAME, SERVER, port=port, answers=answers_verifiers) as process:

            async def kill() -> None:
                os.killpg(process.pid, signal.SIGKILL)

            kind, reason = await failure_of(environment, gateway, kill, "5")
            assert (kind, "in the middle" in reason) == ("environment_error", True)
        assert (await failure_of(environment, gateway))[0] == "environment_unavailable"
        async with running(NAME, SERVER, port=port, answers=answers_verifiers):
            assert len(await episode_of(environment, gateway, "5", lease=a_row())) == 1


class Updating:
    """The engine, which is given new weights while some episodes sample and others have yet to begin."""

    def __init__(self, live: LiveEngine) -> None:
        self._live = live
        self._num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._live.engine, name)

    async def generate(self, *arguments: Any, **named: Any) -> Any:
        self._num_calls += 1
        if self._num_calls == 12:
            await self._live.load_next()
        return await self._live.engine.generate(*arguments, **named)


@pytest.mark.timeout(300)
async def test_on_the_real_engine_each_token_has_the_evidence_of_its_weights_across_an_update(tmp_path):
    async for live in live_engine(tmp_path, tied=True):
        async with playing() as (environment, gateway, _):
            runner = a_runner(
                Updating(live), environment, gateway, tokenizer=words(), max_new_tokens=40, max_model_len=MAX_MODEL_LEN
            )
            await live.load_next()
            lease = a_lease(
                environment=environment.url, group_size=8, min_version=live.engine.loaded_version,
                **a_row("reward 0.5", prompt="w7 w8 w9", turns=3),
            )  # fmt: skip
            trajectories = (await runner.run(lease)).trajectories
        assert sum(trajectory.turns for trajectory in trajectories) == 24
        assert {trajectory.reward for trajectory in trajectories} == {0.5}
        assert len({version for each in trajectories for version, _ in each.version_runs()}) == 2
        for trajectory in trajectories:
            np.testing.assert_array_equal(trajectory.token_versions != NOT_SAMPLED, trajectory.loss_mask)
            for version, _ in trajectory.version_runs():
                expected = forward_logprobs(live.models[version], trajectory.token_ids, temperature=1.0)
                of_version = trajectory.token_versions == version
                assert np.abs(expected - trajectory.behavior_logprobs[1:])[of_version[1:]].max() < TOLERANCE
