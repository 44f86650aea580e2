"""nemo-gym+http: sessions of NeMo Gym's resources servers, and what such a server does when its session is lost."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import (
    BadRow,
    Environment,
    EnvironmentFailure,
    Said,
    StepResult,
    parse_row,
)
from rollout_server.environments.lifeline import Lifeline
from tests.rollout_server.http_twin import Request, an_http_server, reply
from tests.rollout_server.nemo_gym_twin import NemoGymTwin, a_nemo_gym_server, signed

ADD = {"type": "function", "name": "add", "description": "sum", "parameters": {"type": "object"}, "strict": True}
SECRET = {"type": "function", "name": "secret", "parameters": {"type": "object"}, "strict": True}
ASKED = [
    {"role": "developer", "content": "be brief"},
    {"role": "user", "content": [{"type": "input_text", "text": "2+3"}]},
]
FIELDS = {"responses_create_params": {"input": ASKED, "tools": [ADD]}, "expected": 5}
ROW = parse_row(json.dumps(FIELDS).encode())
NO_TOOLS = parse_row(b'{"responses_create_params": {"input": "Deal."}, "seed": 1}')
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": 3}}</tool_call>'


@asynccontextmanager
async def playing(*servers: NemoGymTwin, **settings: Any) -> AsyncIterator[Environment]:
    values = {"step_timeout_s": 5.0, "tries": 1, "replicas": tuple(server.url for server in servers[1:])} | settings
    async with asyncio.timeout(40), environment_at(servers[0].url, EnvironmentSettings(**values)) as environment:
        yield environment


async def play(environment: Environment, *texts: str, row: Any = ROW) -> list[StepResult]:
    async with environment.episode(row, seed=7) as episode:
        await episode.reset()
        return [await episode.step(Said(text=text)) for text in texts]


async def failure_of(environment: Environment, *texts: str, row: Any = ROW) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await play(environment, *texts, row=row)
    return caught.value


# --- tools, and a verdict at the end ---------------------------------------------------------------------------------


async def test_the_row_seeds_a_session_tools_are_called_in_it_and_what_is_said_is_verified():
    async with a_nemo_gym_server() as server, playing(server) as environment:
        called, verified = await play(environment, f"Let me add. {CALL}", "reward 0.5")
    assert (called.done, called.observation) == (False, '<tool_response>\n{"sum": 5}\n</tool_response>')
    assert verified == StepResult(reward=0.5, done=True)
    assert list(server.sessions.values()) == [["seed_session", "add", "verify", "close_session"]]
    (_, seeded), (_, arguments), (_, asked), _ = server.bodies
    assert (seeded, arguments) == (FIELDS, {"a": 2, "b": 3})
    assert {name: asked[name] for name in FIELDS} == FIELDS
    said, call, output, last = asked["response"]["output"]
    assert (said["content"][0]["text"], call["name"], output["output"]) == ("Let me add.", "add", '{"sum": 5}')
    assert call["call_id"] == output["call_id"]
    assert json.loads(call["arguments"]) == {"a": 2, "b": 3}
    assert (last["content"][0]["text"], asked["response"]["status"]) == ("reward 0.5", "completed")


async def test_the_policy_reads_the_chat_of_the_row_and_its_tools():
    async with (
        a_nemo_gym_server() as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        system, user = await episode.reset()
    assert (system["role"], user) == ("system", {"role": "user", "content": "2+3"})
    assert system["content"].startswith("be brief\n\nTools:\n")
    assert '"name": "add"' in system["content"]
    assert "<tool_call>" in system["content"]


async def test_a_row_with_a_prompt_of_its_own_is_read_as_it_is_and_asked_in_the_servers_words():
    row = parse_row(b'{"prompt": "2+3=", "expected": 5}')
    async with a_nemo_gym_server() as server, playing(server) as environment:
        async with environment.episode(row, seed=0) as episode:
            assert await episode.reset() == "2+3="
        assert server.bodies[0][1]["responses_create_params"] == {"input": [{"role": "user", "content": "2+3="}]}


async def test_several_calls_of_one_turn_are_answered_in_their_order():
    call = CALL.replace("3", "4")
    async with a_nemo_gym_server() as server, playing(server) as environment:
        [result] = await play(environment, f"{CALL}\n{call}")
    assert (
        result.observation
        == '<tool_response>\n{"sum": 5}\n</tool_response>\n<tool_response>\n{"sum": 6}\n</tool_response>'
    )


async def test_thoughts_are_no_part_of_the_answer():
    async with a_nemo_gym_server() as server, playing(server) as environment:
        await play(environment, "<think>is it 3?</think>reward 1")
    thoughts, said = server.bodies[1][1]["response"]["output"]
    assert (thoughts["type"], thoughts["summary"][0]["text"]) == ("reasoning", "is it 3?")
    assert said["content"][0]["text"] == "reward 1"


@pytest.mark.parametrize("name", ["verify", "close_session", "no/../verify", "nothing", "seed_session"])
async def test_the_policy_cannot_call_what_is_no_tool_of_the_row(name):
    tools = [ADD, {**SECRET, "name": "verify"}, {**SECRET, "name": "no/../verify"}]
    row = parse_row(json.dumps({"responses_create_params": {"input": "x", "tools": tools}}).encode())
    async with a_nemo_gym_server() as server, playing(server) as environment:
        [result] = await play(environment, f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>', row=row)
    assert "there is no tool" in str(result.observation)
    assert [route for route, _ in server.bodies] == ["seed_session", "close_session"]


@pytest.mark.parametrize("status", [400, 404, 422, 500])
async def test_an_error_of_a_tool_is_the_policys_to_read(status):
    async with a_nemo_gym_server() as server, playing(server) as environment:
        server.tool_status = status
        result, last = await play(environment, CALL, "reward 1")
    assert "told to" in str(result.observation)
    assert last.reward == 1.0


@pytest.mark.parametrize("status", [401, 302, 429, 502, 503])
async def test_a_tool_that_is_not_there_fails_the_episode(status):
    async with a_nemo_gym_server() as server, playing(server) as environment:
        server.tool_status = status
        failure = await failure_of(environment, CALL)
    assert failure.kind == "environment_error"


async def test_a_broken_tool_call_is_the_policys_fault():
    async with a_nemo_gym_server() as server, playing(server, bad_action_reward=-0.5) as environment:
        assert await play(environment, '<tool_call>{"name": 3}</tool_call>') == [StepResult(reward=-0.5, done=True)]
        assert await play(environment, "<tool_call>{") == [StepResult(reward=-0.5, done=True)]
        assert "2 bad actions" in repr(environment)


async def test_where_the_policy_has_no_turn_left_what_it_did_is_verified_as_it_stands():
    async with (
        a_nemo_gym_server() as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        await episode.reset()
        result = await episode.step(Said(text=f"reward 0.5{CALL}"))
        assert result.end is not None
        assert await result.end() == 0.5
    assert server.bodies[2][1]["response"]["status"] == "incomplete"


async def test_what_was_cut_is_verified_and_said_to_be_incomplete():
    async with (
        a_nemo_gym_server() as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        await episode.reset()
        result = await episode.step(Said(text="reward 1", is_cut=True))
        assert result == StepResult(reward=1.0, done=True)
    assert server.bodies[1][1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


# --- an answer to every turn -----------------------------------------------------------------------------------------


async def test_a_server_of_the_gymnasium_style_answers_every_turn():
    async with (
        a_nemo_gym_server(style="step") as server,
        playing(server) as environment,
        environment.episode(NO_TOOLS, seed=0) as episode,
    ):
        assert await episode.reset() == [{"role": "user", "content": "Deal."}, {"role": "user", "content": "do"}]
        assert await episode.step(Said(text="say hit")) == StepResult(reward=0.25, done=False, observation="hit")
        assert await episode.step(Said(text="reward -1")) == StepResult(reward=-1.0, done=True)
    assert list(server.sessions.values()) == [["reset", "step", "step"]]
    assert [len(body["response"]["output"]) for route, body in server.bodies if route == "step"] == [1, 1]


async def test_what_the_server_says_it_supports_is_used():
    info = {"supports_explicit_close": True, "supports_step_idempotency": True}
    async with a_nemo_gym_server(style="step", info=info) as server, playing(server) as environment:
        await play(environment, "say a", "say b", row=NO_TOOLS)
    assert list(server.sessions.values()) == [["reset", "step", "step", "close"]]
    numbers = [body["_ng_step_request_id"] for route, body in server.bodies if route == "step"]
    assert len(set(numbers)) == 2


async def test_outputs_of_tools_come_before_what_the_environment_says():
    said = {"observation": "next", "info": {"tool_outputs": [{"call_id": "c", "output": "5"}]}}
    async with a_nemo_gym_server(style="step") as server, playing(server) as environment:
        [result] = await play(environment, f"raw {json.dumps(said)}", row=NO_TOOLS)
    assert result.observation == "<tool_response>\n5\n</tool_response>\nnext"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"terminated": "yes"}, "terminated came as str"),
        ({"truncated": 1}, "truncated came as int"),
        ({"observation": {}}, "observation came as dict"),
    ],
)
async def test_wrong_types_fail_the_episode(said, reason):
    async with a_nemo_gym_server(style="step") as server, playing(server) as environment:
        failure = await failure_of(environment, f"raw {json.dumps(said)}", row=NO_TOOLS)
    assert (failure.kind, failure.reason) == ("environment_error", f"{'an ' * ('obs' in reason)}{reason}")


async def test_truncated_is_told_from_terminated():
    async with a_nemo_gym_server(style="step") as server, playing(server) as environment:
        [cut] = await play(environment, 'raw {"reward": 1, "truncated": true}', row=NO_TOOLS)
        [both] = await play(environment, 'raw {"reward": 1, "truncated": true, "terminated": true}', row=NO_TOOLS)
    assert (cut.truncated, both.truncated) == (True, False)


# --- failure is not reward 0 -----------------------------------------------------------------------------------------


async def test_a_masked_sample_is_a_failure_whatever_its_reward():
    said = '{"reward": 1.0, "mask_sample": true, "failure_kind": "judge_failed", "failure_reason": "no judge"}'
    async with a_nemo_gym_server() as server, playing(server) as environment:
        failure = await failure_of(environment, f"raw {said}")
    assert (failure.kind, failure.reason) == ("masked", "judge_failed: no judge")


async def test_a_failure_kind_alone_leaves_the_reward_valid():
    said = '{"reward": 1.0, "mask_sample": false, "failure_kind": "judge_unparseable"}'
    async with a_nemo_gym_server() as server, playing(server) as environment:
        assert await play(environment, f"raw {said}") == [StepResult(reward=1.0, done=True)]


@pytest.mark.parametrize(
    "said",
    ["[]", "nothing", '{"reward": null}', "{}", '{"reward": 1, "mask_sample": "no"}', '{"reward": NaN}', "[" * 9999],
)
async def test_garbage_is_a_failure(said):
    async with a_nemo_gym_server() as server, playing(server) as environment:
        assert (await failure_of(environment, f"raw {said}")).kind in ("environment_error", "bad_reward")


async def test_a_server_that_gives_no_cookie_is_not_asked_for_a_reward():
    async with a_nemo_gym_server(cookie="") as server, playing(server) as environment:
        failure = await failure_of(environment, "reward 1")
    assert "gave no session cookie" in failure.reason
    assert [route for route, _ in server.bodies] == ["seed_session"]


@pytest.mark.parametrize(
    "cookie",
    ["twin={}; path=/elsewhere", "twin={}; domain=example.org; path=/", "twin={}; Max-Age=0", "twin={}; secure"],
)
async def test_a_cookie_that_would_not_come_back_fails_the_episode(cookie):
    """Else the server would answer as if it were another session: 200, and a reward of 0."""
    async with a_nemo_gym_server(cookie=cookie) as server, playing(server) as environment:
        failure = await failure_of(environment, "reward 1")
    assert "cookie" in failure.reason
    assert "verify" not in [route for route, _ in server.bodies]


async def test_a_session_that_the_server_has_forgotten_is_no_reward_of_0():
    async with (
        a_nemo_gym_server() as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        await episode.reset()
        server.sessions.clear()
        with pytest.raises(EnvironmentFailure, match="forgot the session"):
            await episode.step(Said(text="reward 1"))


async def test_a_server_that_was_started_again_knows_no_session_and_its_reward_is_not_taken():
    async with a_nemo_gym_server() as server, playing(server) as environment:
        async with environment.episode(ROW, seed=0) as episode:
            await episode.reset()
            [replica] = environment.servers._replicas  # type: ignore[attr-defined]
            await server.http.stop()
            async with asyncio.timeout(10):
                while replica.lifeline.deaths == 0:
                    await asyncio.sleep(0.005)
            await server.http.start(server.http.port)  # with the same key: it takes the old cookie
            with pytest.raises(EnvironmentFailure, match="ended in the middle"):
                await episode.step(Said(text="reward 1"))
        assert [step.reward for step in await play(environment, "reward 2")] == [2.0]


async def test_a_connection_that_is_closed_for_being_idle_is_no_death():
    async def hangs_up(request: Request) -> bytes:
        return reply("")

    async with an_http_server(hangs_up) as server:
        lifeline = Lifeline("127.0.0.1", server.port)
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(lifeline.watch())
            await lifeline.held(timeout_s=5)
            for _ in range(3):
                seen = server.num_connections
                for writer in server._writers:
                    writer.transport.abort()
                while server.num_connections == seen:
                    await asyncio.sleep(0.005)
            assert repr(lifeline).endswith("up, 0 deaths>")
            watch.cancel()


async def test_no_step_follows_the_end():
    async with (
        a_nemo_gym_server() as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        await episode.reset()
        await episode.step(Said(text="reward 1"))
        with pytest.raises(AssertionError, match="after the end"):
            await episode.step(Said(text="reward 1"))


async def test_a_thousand_episodes_leave_no_session_and_no_connection_behind():
    async with a_nemo_gym_server() as server, playing(server, max_concurrent=32) as environment:
        results = await asyncio.gather(*(play(environment, f"reward {number}") for number in range(1000)))
        assert [result.reward for [result] in results] == list(range(1000))
        assert len(server.sessions) == 1000
        assert {tuple(routes) for routes in server.sessions.values()} == {("seed_session", "verify", "close_session")}
        async with asyncio.timeout(5):
            while server.http.num_open > 1:  # the lifeline's
                await asyncio.sleep(0.005)


# --- servers that are not there, or not what they should be ----------------------------------------------------------


async def test_a_row_that_the_server_refuses_is_a_bad_row():
    async def refuses(request: Request) -> bytes:
        return reply('{"detail": "expected_count: field required"}', status=422)

    async with an_http_server(refuses) as server:
        url = f"nemo-gym+http://127.0.0.1:{server.port}"
        async with (
            environment_at(url, EnvironmentSettings()) as environment,
            environment.episode(ROW, seed=0) as episode,
        ):
            with pytest.raises(BadRow, match=r"said 422: .*expected_count"):
                await episode.reset()


async def test_a_server_that_raises_for_one_row_is_not_down_for_the_others():
    async def poisoned(request: Request) -> bytes:
        return reply("KeyError('x')", status=500) if b"poison" in request.body else await server.answer(request)

    poison = parse_row(b'{"prompt": "poison"}')
    async with a_nemo_gym_server() as server, playing(server, tries=2) as environment:
        server.http.handler = poisoned
        for _ in range(3):
            assert (await failure_of(environment, "", row=poison)).kind == "environment_error"
            assert [step.reward for step in await play(environment, "reward 1")] == [1.0]


async def test_a_server_that_raises_for_every_row_is_down():
    async def broken(request: Request) -> bytes:
        return reply("KeyError('x')", status=500)

    async with an_http_server(broken) as server:
        settings = EnvironmentSettings(tries=4)
        async with environment_at(f"nemo-gym+http://127.0.0.1:{server.port}", settings) as environment:
            assert (await failure_of(environment, "")).kind == "environment_unavailable"


async def test_a_server_of_another_kind_is_named_as_such():
    async def not_found(request: Request) -> bytes:
        return reply("no", status=404)

    async with (
        an_http_server(not_found) as server,
        environment_at(f"nemo-gym+http://127.0.0.1:{server.port}", EnvironmentSettings()) as environment,
    ):
        failure = await failure_of(environment, "")
    assert failure.kind == "environment_unavailable"
    assert "neither /seed_session nor /reset" in failure.reason


async def test_a_server_that_is_down_is_unavailable_and_used_once_it_is_up():
    server = NemoGymTwin()
    await server.http.start(0)
    await server.http.stop()
    async with playing(server, tries=2) as environment:
        assert (await failure_of(environment, "reward 1")).kind == "environment_unavailable"
        await server.http.start(server.http.port)
        async with asyncio.timeout(20):
            while True:
                with suppress(EnvironmentFailure):
                    assert [step.reward for step in await play(environment, "reward 1")] == [1.0]
                    break
                await asyncio.sleep(0.05)
        await server.http.stop()


async def test_episodes_go_to_the_server_that_is_up():
    async with a_nemo_gym_server() as down, a_nemo_gym_server() as up:
        await down.http.stop()
        async with playing(down, up, tries=6) as environment:
            results = await asyncio.gather(*(play(environment, "reward 1") for _ in range(20)))
        assert {step.reward for [step] in results} == {1.0}
        await down.http.start(0)


async def test_no_more_episodes_are_begun_than_are_allowed():
    async with a_nemo_gym_server() as server, playing(server, max_concurrent=2, capacity_timeout_s=0.3) as environment:
        async with environment.episode(ROW, seed=0) as one, environment.episode(ROW, seed=0) as two:
            await one.reset()
            await two.reset()
            failure = await failure_of(environment, "reward 1")
        assert failure.kind == "environment_unavailable"
        assert "max_concurrent" in failure.reason
        assert len(server.sessions) == 2


@pytest.mark.parametrize("url", ["nemo-gym+http://", "nemo-gym+http://a:b@c:1", "nemo-gym+http://host:99999"])
def test_a_malformed_url_is_refused(url):
    with pytest.raises(ValueError, match=r"URL|HOST:PORT"):
        environment_at(url)


def test_the_twin_signs_as_starlette_does():
    assert signed("x").split(".")[0] == "eyJzZXNzaW9uX2lkIjogIngifQ=="
