"""nemo-gym+http against resources servers that come with nemo-gym 0.7.0, in processes of their own."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import BadRow, Environment, EnvironmentFailure, Row, Said, parse_row
from rollout_server.environments.http_server import HttpServer
from tests.environments.__main__ import HERE, NEMO_GYM
from tests.environments.servers import a_free_port, running

pytestmark = [pytest.mark.environments, pytest.mark.nemo_gym]

SERVER = HERE / "nemo_gym_server.py"
COUNTER = "example_session_state_mgmt:StatefulCounterResourcesServer"
BLACKJACK = "blackjack:BlackjackEnv"
TOOLS = [
    {"type": "function", "name": "increment_counter", "description": "", "strict": True,
     "parameters": {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}},
    {"type": "function", "name": "get_counter_value", "description": "", "strict": True,
     "parameters": {"type": "object", "properties": {}, "required": []}},
]  # fmt: skip


def a_row(**changes: Any) -> Row:
    """As in the example data of the counter."""
    params = {"input": [{"role": "user", "content": "add 1 then add 2"}], "tools": TOOLS}
    fields = {"responses_create_params": params, "initial_count": 3, "expected_count": 6}
    return parse_row(json.dumps(fields | changes).encode())


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


@asynccontextmanager
async def playing(server: str, **settings: Any) -> AsyncIterator[Environment]:
    port = a_free_port()
    url = f"nemo-gym+http://127.0.0.1:{port}"
    async with (
        running(NEMO_GYM, SERVER, server, port=port),
        environment_at(url, EnvironmentSettings(**settings)) as environment,
    ):
        yield environment


async def count(environment: Environment, *counts: int, initial: int, expected: int) -> float:
    async with environment.episode(a_row(initial_count=initial, expected_count=expected), seed=0) as episode:
        await episode.reset()
        for number in counts:
            assert "true" in str((await episode.step(Said(text=call("increment_counter", count=number)))).observation)
        said = str((await episode.step(Said(text=call("get_counter_value")))).observation)
        assert said == f'<tool_response>\n{{"count":{initial + sum(counts)}}}\n</tool_response>'
        result = await episode.step(Said(text="<think>done</think>It is done."))
        assert result.done
        return result.reward


async def test_each_of_two_hundred_sessions_has_a_counter_of_its_own():
    async with playing(COUNTER, max_concurrent=64) as environment:
        right = [count(environment, 1, number, initial=number, expected=2 * number + 1) for number in range(100)]
        wrong = [count(environment, 1, initial=number, expected=number) for number in range(100)]
        rewards = await asyncio.gather(*right, *wrong)
    assert rewards == [1.0] * 100 + [0.0] * 100


async def test_arguments_that_a_tool_refuses_are_the_policys_to_read_and_a_row_without_its_fields_is_a_bad_row():
    async with playing(COUNTER) as environment:
        async with environment.episode(a_row(), seed=0) as episode:
            await episode.reset()
            refused = await episode.step(Said(text=call("increment_counter", count="many")))
            assert "valid integer" in str(refused.observation)
            assert (await episode.step(Said(text=call("increment_counter", count=3)))).reward == 0.0
            assert (await episode.step(Said(text="done"))).reward == 1.0
        async with environment.episode(parse_row(b'{"prompt": "x"}'), seed=0) as episode:
            with pytest.raises(BadRow, match="initial_count"):
                await episode.reset()


async def test_the_real_server_still_takes_a_request_without_its_cookie_for_another_session():
    """What the client must never do: the counter is right, and the reward is 0 all the same."""
    port = a_free_port()
    output = [{"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": []}]
    response = {"id": "r", "object": "response", "created_at": 0, "model": "m", "output": output,
                "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}  # fmt: skip
    row = dict(a_row(expected_count=3).fields)
    async with running(NEMO_GYM, SERVER, COUNTER, port=port):
        verdicts = []
        for keeps in (True, False):
            url = f"http://127.0.0.1:{port}"
            async with HttpServer(url, max_reply_bytes=1 << 20) as one, HttpServer(url, max_reply_bytes=1 << 20) as two:
                await one.post_json(json.dumps(row).encode(), timeout_s=30, below="/seed_session")
                body = json.dumps(row | {"response": response}).encode()
                verdicts.append(
                    json.loads(await (one if keeps else two).post_json(body, timeout_s=30, below="/verify"))
                )
    assert [(verdict["reward"], verdict["mask_sample"]) for verdict in verdicts] == [(1.0, False), (0.0, False)]


async def test_a_server_that_was_started_again_in_the_middle_fails_the_episode_and_the_next_one_is_well():
    port = a_free_port()
    url = f"nemo-gym+http://127.0.0.1:{port}"
    async with (
        environment_at(url, EnvironmentSettings()) as environment,
        environment.episode(a_row(expected_count=3), seed=0) as episode,
    ):
        async with running(NEMO_GYM, SERVER, COUNTER, port=port):
            await episode.reset()
        async with running(NEMO_GYM, SERVER, COUNTER, port=port):
            with pytest.raises(EnvironmentFailure, match="ended in the middle"):
                await episode.step(Said(text="done"))
            assert await count(environment, 3, initial=3, expected=6) == 1.0


async def test_blackjack_is_played_turn_by_turn():
    row = parse_row(b'{"responses_create_params": {"input": [{"role": "user", "content": "Deal me in."}]}}')

    async def hand(environment: Environment) -> float:
        async with environment.episode(row, seed=0) as episode:
            shown = str(list(await episode.reset())[-1]["content"])
            while True:
                value = int(re.search(r"= (\d+)", shown)[1])  # type: ignore[index]
                choice = "hit" if value < 17 else "stand"
                result = await episode.step(Said(text=f"Let us <action>{choice}</action>"))
                if result.done:
                    return result.reward
                shown = str(result.observation)

    async with playing(BLACKJACK) as environment:
        rewards = await asyncio.gather(*(hand(environment) for _ in range(100)))
    assert set(rewards) <= {-1.0, 0.0, 1.0}
    assert {-1.0, 1.0} <= set(rewards)
