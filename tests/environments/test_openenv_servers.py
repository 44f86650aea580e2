"""openenv+ws against the real library in both versions, in processes of its own."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import (
    Environment,
    EnvironmentFailure,
    Episode,
    Said,
    StepResult,
    parse_row,
)
from tests.environments.__main__ import HERE, ROOT
from tests.environments.servers import a_free_port, running

VERSIONS = ["openenv-0.10", "openenv-core-0.3"]
in_either = pytest.mark.parametrize("version", VERSIONS)
also_in_make_test = pytest.mark.parametrize(
    "version", [pytest.param(VERSIONS[0], marks=pytest.mark.environments), VERSIONS[1]]
)

ROW = parse_row(b'{"prompt": "Q: ", "reset": {"level": 2}}')
PUZZLES = ROOT / "docs" / "openenv_server.py"
OBEDIENT = HERE / "obedient_server.py"
TOOLS = HERE / "tool_server.py"
GAME = HERE / "textarena_server.py"


@asynccontextmanager
async def playing(
    version: str, script: Path, *flags: str, port: int = 0, **settings: Any
) -> AsyncIterator[Environment]:
    port = port or a_free_port()
    async with (
        running(version, script, *flags, port=port),
        environment_at(f"openenv+ws://127.0.0.1:{port}", EnvironmentSettings(**settings)) as environment,
    ):
        yield environment


async def play(environment: Environment, *texts: str, seed: int = 0) -> list[StepResult]:
    async with environment.episode(ROW, seed=seed) as episode:
        await episode.reset()
        return [await episode.step(Said(text=text)) for text in texts]


async def failure_of(environment: Environment, *texts: str) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await play(environment, *texts)
    return caught.value


@also_in_make_test
async def test_the_server_of_the_documentation_serves_reasoning_gym(version):
    async with playing(version, PUZZLES, "--tries", "2", "--sessions", "8") as environment:
        questions = []
        for seed in (1, 1, 2):
            async with environment.episode(ROW, seed=seed) as episode:
                question = str(await episode.reset())
                terms = re.fullmatch(r"Q: .*?: ([\d +-]+) =", question)
                assert terms is not None
                answer = eval(terms[1])
                wrong = await episode.step(Said(text=str(answer + 1)))
                assert (wrong.done, wrong.reward) == (False, 0.0)
                assert wrong.observation == "That is not right. Try again."
                assert await episode.step(Said(text=f" {answer}\n")) == StepResult(reward=1.0, done=True)
            questions.append(question)
        assert questions[0] == questions[1] != questions[2]
        results = await asyncio.gather(*(play(environment, "1", "2", seed=seed) for seed in range(200)))
        assert {len(steps) for steps in results} == {2}


@in_either
@pytest.mark.environments
async def test_sixteen_episodes_wait_their_turn_for_a_server_with_one_session(version):
    async with playing(version, OBEDIENT, "--sessions", "1") as environment:
        results = await asyncio.gather(*(play(environment, "a", f"reward {number}") for number in range(16)))
    assert [steps[-1].reward for steps in results] == list(range(16))


@also_in_make_test
async def test_what_real_servers_do_with_odd_environments_is_told_apart(version):
    async with playing(version, OBEDIENT, step_timeout_s=2.0, max_reply_bytes=3 << 20) as environment:
        async with environment.episode(ROW, seed=3) as episode:
            assert str(await episode.reset()).startswith("Q: seed 3 extra [('level', 2)]")
            assert await episode.step(Said(text="a")) == StepResult(reward=0.25, done=False, observation="1: a")
        assert (await failure_of(environment, "reward nan")).kind == "bad_reward"  # arrives as null
        assert (await failure_of(environment, "reward inf")).kind == "bad_reward"
        assert (await failure_of(environment, "reward 1e30")).kind == "bad_reward"
        raised = await failure_of(environment, "raise apples")
        assert (raised.kind, "apples" in raised.reason) == ("environment_error", True)
        assert (await failure_of(environment, "sleep 4")).kind == "environment_timeout"
        [big] = await play(environment, f"big {2 << 20}")
        assert len(big.observation) == 2 << 20
        assert "longer than max_reply_bytes" in (await failure_of(environment, f"big {4 << 20}")).reason
        assert [step.reward for step in await play(environment, "reward 1")] == [1.0]


@in_either
@pytest.mark.environments
async def test_a_server_that_is_killed_fails_episodes_and_runs_them_again_once_it_is_back(version):
    port = a_free_port()
    url = f"openenv+ws://127.0.0.1:{port}"
    async with environment_at(url, EnvironmentSettings(step_timeout_s=20)) as environment:
        async with running(version, OBEDIENT, port=port) as server, environment.episode(ROW, seed=0) as episode:
            await episode.reset()
            server.kill()
            with pytest.raises(EnvironmentFailure, match="environment_error"):
                await episode.step(Said(text="a"))
        assert (await failure_of(environment, "a")).kind == "environment_unavailable"
        async with running(version, OBEDIENT, port=port), asyncio.timeout(60):
            while True:
                try:
                    assert [step.reward for step in await play(environment, "reward 2")] == [2.0]
                    break
                except EnvironmentFailure:
                    await asyncio.sleep(0.2)


@also_in_make_test
async def test_tools_of_a_real_server_are_listed_and_called(version):
    async with playing(version, TOOLS) as environment, environment.episode(ROW, seed=0) as episode:
        first = str(await episode.reset())
        assert '"name": "add"' in first
        call = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'
        result = await episode.step(Said(text=call))
        assert (result.done, result.observation) == (False, "5")
        unknown = await episode.step(Said(text='{"name": "multiply", "arguments": {}}'))
        assert "multiply" in str(unknown.observation) or "not" in str(unknown.observation)


async def halved(episode: Episode) -> tuple[float, int]:
    """The reward of guessing a number as the hints say, and how many turns it took."""
    assert "Guess The Number" in str(await episode.reset())
    low, high, turns = 1, 20, 0
    while True:
        guess, turns = (low + high) // 2, turns + 1
        result = await episode.step(Said(text=f"I say [{guess}]."))
        if result.done:
            return result.reward, turns
        assert "Guess The Number" not in str(result.observation)  # what was read is not read again
        low, high = (guess + 1, high) if "higher" in str(result.observation) else (low, guess - 1)


@in_either
@pytest.mark.environments
async def test_a_game_of_textarena_is_played_to_its_end(version):
    async with playing(version, GAME) as environment:
        async with environment.episode(ROW, seed=5) as episode:
            reward, turns = await halved(episode)
        assert (reward, turns <= 5) == (1.0, True)
        again, lost = await play(environment, "eleven", "eleven")
    assert "invalid move" in str(again.observation)  # the policy's fault is the game's to judge
    assert (lost.done, lost.reward) == (True, 0.0)
