"""agent+http and agent:pull: what agents do, good and bad, and what becomes of their episodes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from common.trajectory import FinishReason
from rollout_server.environments import environment_at
from rollout_server.lease_failure import LeaseFailure
from tests.rollout_server.gateway.builders_gateway import (
    a_client,
    a_gateway,
    episode_of,
    error_of,
    sampled_text,
    say,
    user,
)
from tests.rollout_server.http_twin import Dies, Handler, Hangs, Request, an_http_server, reply

CHAT = {"messages": [user("2+3")]}


@asynccontextmanager
async def an_agent_server(handler: Handler, **settings: Any) -> AsyncIterator[Any]:
    """(environment, gateway) with an agent server behind them."""
    values = {"episode_timeout_s": 60.0, "step_timeout_s": 60.0, "tries": 1} | settings
    async with an_http_server(handler) as server, a_gateway() as gateway:
        url = f"agent+http://127.0.0.1:{server.port}/run"
        async with environment_at(url, EnvironmentSettings(**values)) as environment:
            yield environment, gateway


def client_of(asked: Any) -> Any:
    return a_client(asked["base_url"], asked["api_key"])


async def answers(request: Request) -> bytes:
    """A good agent: asks once, and is content with 5."""
    asked = request.json
    async with client_of(asked) as client:
        answer = await say(client, [user(asked["task"]["prompt"])])
    said = answer["choices"][0]["message"]["content"]
    return reply(json.dumps({"reward": float(said == "5")}))


async def failure_of(handler: Handler, *texts: Any, **settings: Any) -> LeaseFailure:
    async with an_agent_server(handler, **settings) as (environment, gateway):
        with pytest.raises(LeaseFailure) as caught:
            await episode_of(environment, gateway, *texts or ("5",))
        assert "0 sessions" in repr(gateway)
    return caught.value


# --- agent+http ------------------------------------------------------------------------------------------------------


async def test_an_agent_server_plays_the_row_through_the_gateway_and_its_reply_is_the_reward():
    asked = []

    async def handler(request):
        asked.append(request.json)
        return await answers(request)

    async with an_agent_server(handler) as (environment, gateway):
        [right] = await episode_of(environment, gateway, "5", lease={"seed": 13})
        [wrong] = await episode_of(environment, gateway, "6")
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert sampled_text(right) == "5<|im_end|>"
    assert (asked[0]["task"], asked[0]["seed"], asked[0]["model"]) == ({"prompt": "2+3"}, 13, "policy")
    assert asked[0]["api_key"] != asked[1]["api_key"]
    assert asked[0]["session_url"] == f"{gateway.address}/session/{asked[0]['api_key']}/v1"
    assert asked[0]["timeout_s"] == 60.0


@pytest.mark.parametrize("body", [b"", b"{}", b"null", b'{"reward": null, "notes": [1]}'])
async def test_where_the_reply_has_no_reward_it_is_the_last_one_that_the_agent_has_set(body):
    async def handler(request):
        async with client_of(request.json) as client:
            await say(client, [user("x")])
            for reward in (0.5, 0.25):
                await client.post("/rl/set_reward", json={"reward": reward})
        return reply(body)

    async with an_agent_server(handler) as (environment, gateway):
        [trajectory] = await episode_of(environment, gateway, "5")
    assert trajectory.reward == 0.25


async def test_an_agent_may_say_that_it_did_not_come_to_the_end():
    async def handler(request):
        await answers(request)
        return reply('{"reward": 0.5, "truncated": true}')

    async with an_agent_server(handler) as (environment, gateway):
        [trajectory] = await episode_of(environment, gateway, "5")
    assert trajectory.finish_reason is FinishReason.TRUNCATED


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ('{"reward": NaN}', "environment_error"),
        ('{"reward": Infinity}', "environment_error"),
        ('{"reward": 1e400}', "environment_error"),
        ('{"reward": "1.0"}', "bad_reward"),
        ('{"reward": true}', "bad_reward"),
        ('{"reward": 1e30}', "bad_reward"),
        ('{"reward": [1.0]}', "bad_reward"),
        ('{"reward": null}', "bad_reward"),
        ("{}", "bad_reward"),
        ("", "bad_reward"),
        ("1.0", "environment_error"),
        ("[]", "environment_error"),
        ("<html>", "environment_error"),
        ("\udcff", "environment_error"),
        ("[" * 100_000, "environment_error"),
        ('{"reward": 1.0, "truncated": "no"}', "environment_error"),
        ('{"masked": "the sandbox was gone", "reward": 1.0}', "masked"),
        ('{"reward": 1.0, "more": "' + "x" * (1 << 20) + '"}', "environment_error"),
    ],
)
async def test_what_is_no_plausible_reward_is_a_failure(body, kind):
    async def handler(request):
        await answers(request)
        return reply(body.encode(errors="surrogateescape"))

    assert (await failure_of(handler, max_reply_bytes=1 << 19)).kind == kind


@pytest.mark.parametrize("reward", ["1.0", True, None, 1e30, [1.0], {}])
async def test_a_reward_that_the_gateway_has_refused_is_none(reward):
    async def handler(request):
        async with client_of(request.json) as client:
            await say(client, [user("x")])
            await client.post("/rl/set_reward", json={"reward": 1.0})
            assert await error_of(client, "/rl/set_reward", {"reward": reward}) == (422, "bad_reward")
        return reply("{}")

    failure = await failure_of(handler)
    assert failure.kind == "bad_reward"
    assert "no reward" not in failure.reason  # but why it was refused


async def raises(request: Request) -> bytes:
    return reply("KeyError: 3", status=500)


async def is_busy(request: Request) -> bytes:
    return reply("later", status=503)


async def redirects(request: Request) -> bytes:
    return reply("", status=302, headers="Location: http://127.0.0.1:1/\r\n")


async def is_another_server(request: Request) -> bytes:
    return reply("Not Found", status=404)


async def refuses(request: Request) -> bytes:
    return reply("no such task", status=422)


async def dies_before_it_asks(request: Request) -> bytes:
    raise Dies


async def dies_after_an_answer(request: Request) -> bytes:
    await answers(request)
    raise Dies


async def is_down_after_an_answer(request: Request) -> bytes:
    await answers(request)
    return reply("later", status=503)


async def never_returns(request: Request) -> bytes:
    raise Hangs


async def never_returns_after_an_answer(request: Request) -> bytes:
    await answers(request)
    raise Hangs


async def asks_for_nothing(request: Request) -> bytes:
    return reply('{"reward": 1.0}')


async def uses_a_wrong_key(request: Request) -> bytes:
    asked = request.json
    async with a_client(asked["base_url"], "sk-" + "0" * 48) as client:
        assert await error_of(client, "/chat/completions", CHAT) == (401, "invalid_api_key")
    return reply('{"reward": 1.0}')


@pytest.mark.parametrize(
    ("agent", "kind", "reason"),
    [
        (raises, "environment_error", "KeyError: 3"),
        (is_busy, "environment_unavailable", "503"),
        (redirects, "environment_unavailable", "not followed"),
        (is_another_server, "environment_unavailable", "404"),
        (refuses, "environment_error", "no such task"),
        (dies_before_it_asks, "environment_unavailable", ""),
        (dies_after_an_answer, "environment_error", ""),
        (is_down_after_an_answer, "environment_error", "503"),
        (never_returns, "environment_timeout", "0.5 s"),
        (never_returns_after_an_answer, "environment_timeout", "0.5 s"),
        (asks_for_nothing, "environment_error", "without a single answer"),
        (uses_a_wrong_key, "environment_error", "without a single answer"),
    ],
)
async def test_an_agent_that_fails_is_no_reward_0(agent, kind, reason):
    timeout_s = 0.5 if "returns" in agent.__name__ else 60.0
    failure = await failure_of(agent, episode_timeout_s=timeout_s)
    assert failure.kind == kind
    assert reason in failure.reason


async def test_a_server_that_is_not_there_is_unavailable():
    async with a_gateway() as gateway, environment_at("agent+http://127.0.0.1:1/run") as environment:
        with pytest.raises(LeaseFailure) as caught:
            await episode_of(environment, gateway, "5")
    assert caught.value.kind == "environment_unavailable"


async def test_a_request_is_repeated_while_the_agent_has_asked_for_nothing():
    tried = 0

    async def handler(request):
        nonlocal tried
        tried += 1
        if tried < 3:
            raise Dies
        return await answers(request)

    async with an_agent_server(handler, tries=5) as (environment, gateway):
        [trajectory] = await episode_of(environment, gateway, "5")
    assert (trajectory.reward, tried) == (1.0, 3)


async def test_a_request_is_not_repeated_once_the_agent_has_had_an_answer():
    tried = 0

    async def handler(request):
        nonlocal tried
        tried += 1
        await answers(request)
        raise Dies

    assert (await failure_of(handler, "5", "5", "5", tries=5)).kind == "environment_error"
    assert tried == 1


async def test_what_an_agent_asks_after_its_reply_is_refused():
    late: list[tuple[int, str]] = []
    asked: list[Any] = []

    async def handler(request):
        asked.append(request.json)
        return await answers(request)

    async with an_agent_server(handler) as (environment, gateway):
        [trajectory] = await episode_of(environment, gateway, "5")
        async with client_of(asked[0]) as client:
            for path, body in (("/chat/completions", CHAT), ("/rl/set_reward", {"reward": 9.0})):
                late.append(await error_of(client, path, body))
    assert late == [(410, "session_ended")] * 2
    assert trajectory.reward == 1.0


async def test_episodes_of_a_good_and_of_a_bad_agent_do_not_disturb_each_other():
    async with (
        an_agent_server(answers) as (good, gateway),
        an_agent_server(never_returns_after_an_answer, episode_timeout_s=0.5) as (bad, _),
        asyncio.TaskGroup() as tasks,
    ):
        fine = [tasks.create_task(episode_of(good, gateway, "5")) for _ in range(20)]
        failing = [tasks.create_task(failing_episode(bad, gateway)) for _ in range(5)]
    assert [episode.result()[0].reward for episode in fine] == [1.0] * 20
    assert {episode.result() for episode in failing} == {"environment_timeout"}


async def failure_in(environment: Any, gateway: Any) -> LeaseFailure:
    with pytest.raises(LeaseFailure) as caught:
        await episode_of(environment, gateway, "5")
    return caught.value


async def failing_episode(environment: Any, gateway: Any) -> str:
    return (await failure_in(environment, gateway)).kind


async def test_leaving_the_environment_ends_its_episodes():
    begun = asyncio.Event()

    async def handler(request):
        begun.set()
        raise Hangs

    async with an_agent_server(handler, episode_timeout_s=60) as (environment, gateway), asyncio.TaskGroup() as tasks:
        episode = tasks.create_task(failing_episode(environment, gateway))
        await begun.wait()
        await environment.__aexit__(None, None, None)
    assert episode.result() == "environment_error"


@pytest.mark.parametrize("url", ["agent+http://", "agent+http://u:p@h/x", "agent:push", "agent:", "agent:pull?x"])
async def test_a_url_that_can_be_no_agent_is_refused(url):
    with pytest.raises(ValueError, match=r"must look like|must be|user name"):
        environment_at(url)


# --- agent:pull ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def pulling(url: str = "agent:pull", key: str | None = None, **settings: Any) -> AsyncIterator[Any]:
    values = {"episode_timeout_s": 60.0, "step_timeout_s": 60.0, "capacity_timeout_s": 60.0} | settings
    async with a_gateway(agent_key=key) as gateway, environment_at(url, EnvironmentSettings(**values)) as environment:
        yield environment, gateway


async def test_an_agent_asks_for_a_task_plays_it_and_ends_it():
    async def agent(gateway):
        async with a_client(gateway.address) as client:
            asked = (await client.post("/rl/start_session", json={})).json()
        async with client_of(asked) as client:
            answer = await say(client, [user(asked["task"]["prompt"])])
            reward = float(answer["choices"][0]["message"]["content"] == "5")
            assert (await client.post("/rl/set_reward", json={"reward": reward})).status_code == 200
            assert (await client.post("/rl/end_session", json={})).json() == {"ended": True}

    async with pulling() as (environment, gateway), asyncio.TaskGroup() as tasks:
        episodes = [tasks.create_task(episode_of(environment, gateway, text)) for text in ("5", "6")]
        for _ in range(2):
            tasks.create_task(agent(gateway))
    rewards = [episode.result()[0].reward for episode in episodes]
    assert rewards == [1.0, 0.0]


async def start(gateway: Any, key: str = "", **body: Any) -> Any:
    async with a_client(gateway.address, key) as client:
        return await client.post("/v1/rl/start_session", json=body)


async def test_a_task_that_nobody_asks_for_waits_without_blame_and_is_then_given_to_nobody():
    async with pulling(capacity_timeout_s=0.05) as (environment, gateway):
        assert await failing_episode(environment, gateway) == "environment_unavailable"
        response = await start(gateway, wait_s=0.0)
    assert (response.status_code, response.json()["error"]["code"]) == (429, "no_task")


async def test_tasks_are_asked_for_by_queue_and_with_the_key():
    async with pulling("agent:pull/coding", key="secret") as (environment, gateway), asyncio.TaskGroup() as tasks:
        episode = tasks.create_task(failing_episode(environment, gateway))
        assert (await start(gateway, queue="coding")).status_code == 401
        assert (await start(gateway, "wrong", queue="coding")).status_code == 401
        assert (await start(gateway, "secret", wait_s=0.0)).status_code == 429
        assert (await start(gateway, "secret", queue="coding", wait_s="x")).status_code == 400
        asked = (await start(gateway, "secret", queue="coding")).json()
        async with client_of(asked) as client:
            await client.post("/rl/end_session", json={"reward": 1.0})
    assert episode.result() == "environment_error"  # it has asked the policy for nothing


@pytest.mark.parametrize("num_answers", [0, 1])
async def test_an_agent_that_dies_is_noticed_by_its_silence(num_answers):
    async with pulling(step_timeout_s=2.0) as (environment, gateway), asyncio.TaskGroup() as tasks:
        episode = tasks.create_task(failure_in(environment, gateway))
        asked = (await start(gateway)).json()
        async with client_of(asked) as client:
            for _ in range(num_answers):
                await say(client, [user("x")])
    assert episode.result().kind == "environment_timeout"
    assert "said nothing for 2 s" in episode.result().reason


async def test_an_agent_that_ends_without_a_reward_has_none():
    async with pulling() as (environment, gateway), asyncio.TaskGroup() as tasks:
        episode = tasks.create_task(failing_episode(environment, gateway))
        asked = (await start(gateway)).json()
        async with client_of(asked) as client:
            await say(client, [user("x")])
            assert await error_of(client, "/rl/end_session", {"reward": "1"}) == (422, "bad_reward")
            await client.post("/rl/end_session")
    assert episode.result() == "bad_reward"


async def test_an_agent_may_end_a_session_as_truncated():
    async with pulling() as (environment, gateway), asyncio.TaskGroup() as tasks:
        episode = tasks.create_task(episode_of(environment, gateway, "5"))
        asked = (await start(gateway)).json()
        async with client_of(asked) as client:
            await say(client, [user("x")])
            await client.post("/rl/end_session", json={"reward": 0.5, "truncated": True})
    [trajectory] = episode.result()
    assert (trajectory.reward, trajectory.finish_reason) == (0.5, FinishReason.TRUNCATED)


async def test_an_agent_that_hung_up_while_it_waited_takes_no_task():
    async with pulling() as (environment, gateway), asyncio.TaskGroup() as tasks:
        async with a_client(gateway.address) as client:
            waiting = tasks.create_task(client.post("/rl/start_session", json={"wait_s": 60.0}))
            while not gateway.offers.num_waiting:
                await asyncio.sleep(0.001)
            waiting.cancel()
        while gateway.offers.num_waiting:
            await asyncio.sleep(0.001)
        episode = tasks.create_task(failing_episode(environment, gateway))
        asked = (await start(gateway)).json()
        async with client_of(asked) as client:
            await client.post("/rl/end_session", json={"reward": 1.0})
    assert episode.result() == "environment_error"
