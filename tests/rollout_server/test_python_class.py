"""python:module:Class: episodes of several turns in worker processes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import (
    Environment,
    EnvironmentFailure,
    EnvironmentStartError,
    Episode,
    Row,
    Said,
    StepResult,
    parse_row,
)

GAMES = "tests.rollout_server.games"


def a_row(**fields: Any) -> Row:
    return parse_row(json.dumps({"prompt": "guess"} | fields).encode())


@asynccontextmanager
async def playing(name: str, **settings: Any) -> AsyncIterator[Environment]:
    async with (
        asyncio.timeout(30),
        environment_at(f"python:{GAMES}:{name}", EnvironmentSettings(**settings)) as environment,
    ):
        yield environment


@asynccontextmanager
async def an_episode(environment: Environment, **fields: Any) -> AsyncIterator[Episode]:
    async with environment.episode(a_row(**fields), seed=0) as episode:
        await episode.reset()
        yield episode


async def step(episode: Episode, text: str) -> StepResult:
    return await episode.step(Said(text=text))


@pytest.mark.parametrize("name", ["Guess", "AsyncGuess"])
async def test_an_episode_goes_on_until_it_is_done_and_has_a_reward_for_each_step(name):
    async with playing(name) as environment, environment.episode(a_row(number=7), seed=11) as episode:
        assert await episode.reset() == "guess (seed 11)"
        assert await step(episode, "3") == StepResult(reward=-0.25, done=False, observation="higher")
        assert await step(episode, "9") == StepResult(reward=-0.25, done=False, observation="lower")
        assert await step(episode, "7") == StepResult(reward=1.0, done=True)


@pytest.mark.parametrize("name", ["Guess", "AsyncGuess"])
async def test_many_episodes_at_once_over_several_processes_do_not_get_mixed_up(name):
    async def play(number: int) -> list[str]:
        heard = []
        async with an_episode(environment, number=number) as episode:
            for guess in range(number + 1):
                heard.append((await step(episode, str(guess))).observation)
        return heard

    async with playing(name, workers=3) as environment:
        episodes = await asyncio.gather(*(play(number % 20) for number in range(200)))
    assert episodes == [["higher"] * (number % 20) + [""] for number in range(200)]


async def test_an_episode_stays_in_its_process_and_later_ones_are_in_other_processes_too():
    async with playing("Obeys", workers=2) as environment, AsyncExitStack() as stack:
        processes: dict[Episode, str] = {}
        while len(set(processes.values())) < 2:
            episode = await stack.enter_async_context(an_episode(environment))
            processes[episode] = str((await step(episode, "process")).observation)
        for episode, process in processes.items():
            assert (await step(episode, "process")).observation == process


async def test_instances_are_closed_when_their_episodes_end_however_they_end():
    async with playing("Obeys", workers=1) as environment:
        for text in ["say a", "raise a", "return 3"] * 30:
            async with an_episode(environment) as episode:
                if text == "say a":
                    await step(episode, text)
                else:
                    with pytest.raises(EnvironmentFailure):
                        await step(episode, text)
        async with an_episode(environment) as episode:
            assert (await step(episode, "count")).observation == "1"


async def test_an_episode_that_is_cancelled_is_closed_too(tmp_path):
    async with playing("Leaves") as environment:
        async with an_episode(environment, path=str(tmp_path / "closed")) as episode:
            await step(episode, "go")
        async with asyncio.timeout(5):
            while not (tmp_path / "closed").exists():
                await asyncio.sleep(0.005)


async def test_an_observation_may_be_chat_messages_and_none_is_no_reward_before_the_end():
    async with playing("Obeys") as environment, an_episode(environment) as episode:
        result = await step(episode, "chat 42")
    assert result == StepResult(reward=0.0, done=False, observation=[{"role": "tool", "content": "42"}])


@pytest.mark.parametrize(
    ("flags", "done", "truncated"),
    [
        ("False False", False, False),
        ("True False", True, False),
        ("False True", True, True),
        ("True True", True, False),
    ],
)
async def test_five_values_are_those_of_gymnasium(flags, done, truncated):
    async with playing("Obeys") as environment, an_episode(environment) as episode:
        result = await step(episode, f"five {flags}")
    assert (result.done, result.truncated) == (done, truncated)


@pytest.mark.parametrize(
    ("returned", "kind", "reason"),
    [
        ("3", "environment_error", "step must return (observation, reward, done) or"),
        ("('a', 1.0)", "environment_error", "got tuple"),
        ("('a', 1.0, 'no')", "environment_error", "done was str"),
        ("('a', 1.0, None)", "environment_error", "done was NoneType"),
        ("(3, 1.0, False)", "environment_error", "an observation must be a text or a list of messages, got int"),
        ("(['a'], 1.0, False)", "environment_error", "got list"),
        ("('x' * 2000, 1.0, False)", "environment_error", "2002 bytes; max_reply_bytes allows 1000"),
        ("('\\ud800', 1.0, False)", "environment_error", "cannot be sent as JSON"),
        ("('', None, True)", "bad_reward", "NoneType"),
        ("('', float('nan'), True)", "bad_reward", "got nan"),
        ("('a', float('inf'), False)", "bad_reward", "got inf"),
        ("('', 1e30, True)", "bad_reward", "1e+30"),
        ("('', True, True)", "bad_reward", "bool"),
        ("('', '1', True)", "bad_reward", "str"),
    ],
)
@pytest.mark.parametrize("name", ["Obeys", "ObeysAsync"])
async def test_what_is_no_answer_is_a_failure_that_says_what_came(name, returned, kind, reason):
    async with playing(name, max_reply_bytes=1000) as environment, an_episode(environment) as episode:
        with pytest.raises(EnvironmentFailure) as caught:
            await step(episode, f"return {returned}")
    assert caught.value.kind == kind
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("name", "text", "kind", "reason"),
    [
        ("Obeys", "raise a", "environment_error", "KeyError: 'a' (at games.py:"),
        ("Obeys", "die", "environment_error", "exit code 3"),
        ("Obeys", "hang", "environment_timeout", "no answer within 0.5 s"),
        ("ObeysAsync", "raise a", "environment_error", "KeyError: 'a' (at games.py:"),
        ("ObeysAsync", "die", "environment_error", "exit code 3"),
        ("ObeysAsync", "hang", "environment_timeout", "no answer within 0.5 s"),
    ],
)
async def test_a_step_that_raises_dies_or_hangs_fails_and_the_next_episode_is_well(name, text, kind, reason):
    async with playing(name, step_timeout_s=0.5) as environment:
        async with an_episode(environment) as episode:
            with pytest.raises(EnvironmentFailure) as caught:
                await step(episode, text)
        assert caught.value.kind == kind
        assert reason in caught.value.reason
        async with an_episode(environment) as episode:
            assert (await step(episode, "say b")).observation == "b"


async def test_a_process_that_dies_takes_its_other_episodes_with_it_and_says_so():
    async with (
        playing("Obeys", workers=1) as environment,
        an_episode(environment) as doomed,
        an_episode(environment) as beside,
    ):
        with pytest.raises(EnvironmentFailure, match="exit code 3"):
            await step(doomed, "die")
        with pytest.raises(EnvironmentFailure, match="the worker process that ran the episode died"):
            await step(beside, "say a")


async def test_steps_that_wait_behind_one_that_kills_the_process_fail_and_are_not_run_elsewhere():
    async with (
        playing("Obeys", workers=1) as environment,
        an_episode(environment) as doomed,
        an_episode(environment) as beside,
        asyncio.TaskGroup() as tasks,
    ):
        outcomes = [tasks.create_task(failure_of(doomed, "die")), tasks.create_task(failure_of(beside, "say a"))]
    assert [outcome.result().kind for outcome in outcomes] == ["environment_error"] * 2
    assert outcomes[1].result().reason == "the worker process that ran the episode died"


async def failure_of(episode: Episode, text: str) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await step(episode, text)
    return caught.value


async def test_a_reset_that_raises_fails_the_episode_with_the_reason():
    async with playing("FailsAtReset") as environment:
        with pytest.raises(EnvironmentFailure, match="LookupError: guess"):
            async with an_episode(environment):
                pass


async def test_a_class_without_step_is_an_error_at_the_start():
    with pytest.raises(EnvironmentStartError, match="Half is a class without the methods reset and step"):
        async with playing("Half"):
            pass


async def test_leaving_while_steps_run_fails_them():
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        async with playing("Obeys", step_timeout_s=60) as environment, an_episode(environment) as episode:
            hanging = tasks.create_task(failure_of(episode, "hang"))
            while " 1 calls in flight" not in repr(environment):
                await asyncio.sleep(0.001)
        assert (await hanging).kind == "environment_error"
