"""openenv+ws: sessions over WebSocket, and a server that does everything wrong."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from common.trajectory import FinishReason
from rollout_server.environments import environment_at
from rollout_server.environments.capacity import QUIET_S, Capacity
from rollout_server.environments.environment import Environment, EnvironmentFailure, Said, StepResult, parse_row
from rollout_server.environments.openenv import OpenEnv
from tests.rollout_server.openenv_twin import OpenEnvTwin, an_openenv_server
from tests.rollout_server.test_episodes import TOKENIZER, a_lease, a_runner, an_engine

ROW = parse_row(b'{"prompt": "first "}')
CHAT = parse_row(b'{"prompt": [{"role": "system", "content": "be brief"}], "reset": {"task": 3}}')


@asynccontextmanager
async def playing(*servers: OpenEnvTwin, **settings: Any) -> AsyncIterator[Environment]:
    values = {"step_timeout_s": 5.0, "replicas": tuple(server.url for server in servers[1:])} | settings
    async with asyncio.timeout(40), environment_at(servers[0].url, EnvironmentSettings(**values)) as environment:
        yield environment


async def play(environment: Environment, *texts: str, row: Any = ROW, seed: int = 7) -> list[StepResult]:
    async with environment.episode(row, seed=seed) as episode:
        await episode.reset()
        return [await episode.step(Said(text=text)) for text in texts]


async def failure_of(environment: Environment, *texts: str) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await play(environment, *texts)
    return caught.value


async def none_open(server: OpenEnvTwin) -> None:
    async with asyncio.timeout(5):
        while server.num_sessions:
            await asyncio.sleep(0.005)


# --- an episode ------------------------------------------------------------------------------------------------------


async def test_an_episode_is_a_session_of_several_steps():
    async with an_openenv_server() as server, playing(server) as environment:
        results = await play(environment, "say hot", "say cold", "reward 0.5")
        await none_open(server)
    assert results == [
        StepResult(reward=0.0, done=False, observation="hot"),
        StepResult(reward=0.0, done=False, observation="cold"),
        StepResult(reward=0.5, done=True),
    ]
    assert (server.num_begun, server.resets) == (1, [{"seed": 7}])


async def test_what_the_environment_says_first_follows_the_rows_prompt():
    async with an_openenv_server() as server, playing(server) as environment:
        async with environment.episode(ROW, seed=1) as episode:
            assert await episode.reset() == "first do"
        async with environment.episode(CHAT, seed=1) as episode:
            assert await episode.reset() == [*CHAT.fields["prompt"], {"role": "user", "content": "do"}]
    assert server.resets[1] == {"seed": 1, "task": 3}


async def test_the_last_observation_which_may_hold_the_answer_is_never_shown():
    async with an_openenv_server() as server, playing(server) as environment:
        assert await play(environment, "finish") == [StepResult(reward=1.0, done=True, observation="")]


async def test_seeds_are_such_as_every_generator_takes():
    async with an_openenv_server() as server, playing(server) as environment:
        await play(environment, "reward 1", seed=(1 << 62) + 5)
    assert server.resets == [{"seed": 5}]


async def test_a_step_without_a_reward_in_the_middle_has_reward_0():
    async with an_openenv_server() as server, playing(server) as environment:
        assert (await play(environment, "say a"))[0].reward == 0.0


async def test_an_action_that_the_environment_does_not_know_is_the_policys_fault_and_ends_the_episode():
    async with an_openenv_server() as server, playing(server, bad_action_reward=-0.5) as environment:
        assert await play(environment, "error VALIDATION_ERROR") == [StepResult(reward=-0.5, done=True)]
        assert repr(environment).endswith("1 bad actions>")


async def test_a_text_that_is_no_action_is_not_even_sent():
    number = {"properties": {"guess": {"type": "integer"}}, "required": ["guess"]}
    async with (
        an_openenv_server(schema={"action": number}) as server,
        playing(server, bad_action_reward=-1.0) as environment,
    ):
        assert await play(environment, "hm") == [StepResult(reward=-1.0, done=True)]


async def test_tools_are_told_to_the_policy_called_and_their_results_shown():
    call = {"properties": {"tool_name": {"type": "string"}, "arguments": {"type": "object"}}, "required": ["tool_name"]}
    tools = [{"name": "echo", "inputSchema": {}}]
    async with (
        an_openenv_server(schema={"action": call}, tools=tools) as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        assert 'Tools:\n{"name": "echo", "inputSchema": {}}' in str(await episode.reset())
        result = await episode.step(Said(text='<tool_call>{"name": "echo", "arguments": {"a": 1}}</tool_call>'))
    assert result.observation == '{"a": 1}'


def always_hot(text: str, schema: Any) -> Any:
    return {"text": "say hot"}


async def test_a_group_of_episodes_of_several_turns_is_sampled_on_its_server(tmp_path):
    hooks = {"parse_action": f"{__name__}:always_hot", "max_turns": 3}
    async with an_openenv_server() as server, playing(server, **hooks) as environment:
        runner = a_runner(await an_engine(tmp_path, eos_logit=99.0), environment)
        row = json.dumps({"prompt": [{"role": "user", "content": "play"}]}).encode()
        group = await runner.run(a_lease(environment=environment.url, row=row, seed=5))
        await none_open(server)
    for trajectory in group.trajectories:
        text = TOKENIZER.decode(trajectory.token_ids.tolist(), skip_special_tokens=False)
        again = "<policy><eos>\n<user>hot"
        assert text == f"<bos><user>play\n\ndo{again * 2}<policy><eos>"
        assert (trajectory.turns, trajectory.finish_reason) == (3, FinishReason.TRUNCATED)
    assert server.resets == [{"seed": 5}] * 4


def parse_guess(text: str, schema: Any) -> Any:
    assert schema["required"] == ["text"]
    return {"text": f"say {int(text)}"} if text != "list" else [text]


def shout(observation: Any) -> Any:
    return observation["text"].upper()


async def test_hooks_of_the_user_make_actions_and_show_observations():
    hooks = {"parse_action": f"{__name__}:parse_guess", "format_observation": f"{__name__}:shout"}
    async with an_openenv_server() as server, playing(server, **hooks) as environment:
        async with environment.episode(ROW, seed=0) as episode:
            assert await episode.reset() == "first DO"
            assert (await episode.step(Said(text="4"))).observation == "4"
            assert (await episode.step(Said(text="four"))).done  # its ValueError: a bad action
        assert "parse_action returned list" in (await failure_of(environment, "list")).reason


@pytest.mark.parametrize("hook", ["nowhere:f", "json:nothing", "json"])
def test_a_hook_that_is_not_there_is_refused_at_the_start(hook):
    with pytest.raises(ValueError, match=hook.partition(":")[0]):
        environment_at("openenv+ws://h:1", EnvironmentSettings(parse_action=hook))


# --- capacity --------------------------------------------------------------------------------------------------------


async def test_sixteen_episodes_wait_their_turn_for_a_server_with_one_session():
    async with an_openenv_server(capacity=1) as server, playing(server) as environment:
        results = await asyncio.gather(*(play(environment, "slow 0.1", f"reward {number}") for number in range(16)))
    assert [steps[-1].reward for steps in results] == list(range(16))
    assert (server.most_sessions, server.num_begun) == (1, 16)
    assert server.num_refused <= 20  # it is not asked again and again


async def test_a_server_that_stays_full_is_given_up_with_that_reason():
    async with (
        an_openenv_server(capacity=1) as server,
        playing(server) as taker,
        taker.episode(ROW, seed=0) as episode,
        playing(server, capacity_timeout_s=0.5) as environment,
    ):
        await episode.reset()
        failure = await failure_of(environment, "reward 1")
    assert failure.kind == "environment_unavailable"
    assert "CAPACITY_REACHED" in failure.reason


async def test_no_more_sessions_are_open_than_the_user_allows():
    async with an_openenv_server() as server, playing(server, max_concurrent=5) as environment:
        await asyncio.gather(*(play(environment, "say a", "reward 1") for _ in range(40)))
    assert server.most_sessions == 5


async def test_a_thousand_episodes_leave_no_session_behind_however_they_end():
    texts = ["reward 1", "error EXECUTION_ERROR", "die", "raw {", "error VALIDATION_ERROR"]
    async with an_openenv_server() as server, playing(server, max_concurrent=64) as environment:
        await asyncio.gather(
            *(play(environment, "say a", texts[number % 5]) for number in range(1000)), return_exceptions=True
        )
        await none_open(server)
        assert isinstance(environment, OpenEnv)
        assert environment.servers._sessions == set()
        [replica] = environment.servers._replicas
        assert replica.capacity.in_use == 0
    assert server.num_begun == 1000


async def test_a_cancelled_episode_leaves_no_session_behind():
    async with an_openenv_server() as server, playing(server) as environment, asyncio.TaskGroup() as tasks:
        episodes = [tasks.create_task(play(environment, "hang")) for _ in range(20)]
        while server.num_sessions < 20:
            await asyncio.sleep(0.005)
        for episode in episodes:
            episode.cancel()
        await none_open(server)


async def test_the_slot_of_one_who_waited_in_vain_goes_to_the_next():
    capacity = Capacity(1)
    async with capacity.slot(timeout_s=1), asyncio.TaskGroup() as tasks:
        with pytest.raises(TimeoutError):
            async with capacity.slot(timeout_s=0.01):
                raise AssertionError
        assert repr(capacity) == "<Capacity 1/1, 0 waiting>"
        waiting = tasks.create_task(take(capacity))
        await asyncio.sleep(0)
        waiting.cancel()
    assert repr(capacity) == "<Capacity 0/1, 0 waiting>"
    async with capacity.slot(timeout_s=0.01):
        assert capacity.in_use == 1


async def take(capacity: Capacity) -> None:
    async with capacity.slot(timeout_s=5):
        pass


async def test_a_limit_learned_from_a_refusal_is_tried_again_after_a_while():
    capacity = Capacity(100)
    async with AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(capacity.slot(timeout_s=1))
        capacity.note_full(10.0)
        assert capacity.limit == 3
        capacity.note_opened(10.0 + QUIET_S / 2)
        assert capacity.limit == 3
        capacity.note_opened(10.0 + QUIET_S)
        assert capacity.limit == 4


# --- everything a server may do --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        ("hang", "environment_timeout", "gave no reply within 0.5 s"),
        ("slow 1", "environment_timeout", "gave no reply within 0.5 s"),
        ("die", "environment_error", "closed the connection"),
        ("error EXECUTION_ERROR", "environment_error", "EXECUTION_ERROR: boom"),
        ("error SESSION_ERROR", "environment_error", "SESSION_ERROR: boom"),
        ("error UNKNOWN_TYPE", "environment_error", "UNKNOWN_TYPE: boom"),
        ("raw {garbage", "environment_error", "not JSON"),
        ("bytes", "environment_error", "not JSON"),
        ("raw [" + "[" * 50_000, "environment_error", "not JSON"),
        ("raw []", "environment_error", "no message"),
        ('raw {"type": "observation"}', "environment_error", "no message"),
        ('raw {"type": "error", "data": {"code": 3}}', "environment_error", "None"),
        ('raw {"type": "state", "data": {}}', "environment_error", "answered with state, expected observation"),
        ('raw {"type": "observation", "data": {"observation": [], "done": false}}', "environment_error", "as list"),
        ('raw {"type": "observation", "data": {"observation": {}}}', "environment_error", "done came as NoneType"),
        (
            'raw {"type": "observation", "data": {"observation": {}, "done": 0}}',
            "environment_error",
            "done came as int",
        ),
        ("none", "bad_reward", "NoneType"),
        ("nan", "bad_reward", "got nan"),
        ("infinity", "bad_reward", "got inf"),
        ("huge", "bad_reward", "1e+30"),
        ("boolean", "bad_reward", "bool"),
        ("text", "bad_reward", "str"),
    ],
)
async def test_what_is_no_answer_is_a_failure_of_its_kind_and_the_next_episode_is_well(text, kind, reason):
    settings = {"step_timeout_s": 0.5, "max_reply_bytes": 1_000_000}
    async with an_openenv_server() as server, playing(server, **settings) as environment:
        failure = await failure_of(environment, text)
        assert [step.reward for step in await play(environment, "reward 1")] == [1.0]
    assert failure.kind == kind
    assert reason in failure.reason


@pytest.mark.parametrize("num_bytes", [2 << 20, 100 << 20])
async def test_an_observation_larger_than_allowed_is_refused_before_it_is_all_here(num_bytes):
    async with an_openenv_server() as server, playing(server, max_reply_bytes=1_000_000) as environment:
        failure = await failure_of(environment, f"big {num_bytes}")
    assert failure.kind == "environment_error"
    assert "sent a message longer than max_reply_bytes, 1000000" in failure.reason


async def test_an_observation_of_2_mib_arrives_whole():
    async with an_openenv_server() as server, playing(server) as environment:
        [result] = await play(environment, f"big {2 << 20}")
    assert len(result.observation) == 2 << 20


async def test_an_answer_that_nobody_asked_for_is_never_taken_for_the_next_one():
    async with (
        an_openenv_server() as server,
        playing(server) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        await episode.reset()
        await episode.step(Said(text="twice"))
        await asyncio.sleep(0.05)  # until the second one is there
        with pytest.raises(EnvironmentFailure, match="said something unasked"):
            await episode.step(Said(text="reward 0"))


async def test_a_late_answer_is_never_credited_to_another_step():
    async with (
        an_openenv_server() as server,
        playing(server, step_timeout_s=0.2) as environment,
        environment.episode(ROW, seed=0) as episode,
    ):
        await episode.reset()
        for _ in range(2):
            with pytest.raises(EnvironmentFailure):
                await episode.step(Said(text="slow 0.3"))
        await none_open(server)


async def test_a_step_after_the_end_is_not_taken_by_the_episode_before():
    async with an_openenv_server() as server, playing(server) as environment:
        assert [step.done for step in await play(environment, "finish")] == [True]
        await none_open(server)


@pytest.mark.parametrize(
    ("at_reset", "kind", "reason"),
    [
        ("error EXECUTION_ERROR", "environment_error", "EXECUTION_ERROR"),
        ("error FACTORY_ERROR", "environment_error", "FACTORY_ERROR"),
        ("error VALIDATION_ERROR", "environment_error", "VALIDATION_ERROR"),
        ("finish", "environment_error", "done before it began"),
        ("hang", "environment_timeout", "no reply within"),
        ("die", "environment_error", "closed the connection"),
    ],
)
async def test_a_reset_that_fails_is_a_failure_of_its_kind(at_reset, kind, reason):
    settings = {"step_timeout_s": 0.5, "tries": 2}
    async with an_openenv_server(at_reset=at_reset) as server, playing(server, **settings) as environment:
        failure = await failure_of(environment)
    assert failure.kind == kind
    assert reason in failure.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"schema": {"observation": {}}}, "/schema says nothing of use"),
        ({"schema": {"action": {"properties": {}}}}, "set parse_action"),
        ({"schema": []}, "/schema says nothing of use"),
        ({"status": HTTPStatus.NOT_FOUND}, "said 404"),
        ({"status": HTTPStatus.FOUND, "location": "ws://10.9.9.9/ws"}, "said 302; redirects are not followed"),
        ({"status": HTTPStatus.INTERNAL_SERVER_ERROR}, "said 500"),
    ],
)
async def test_a_server_that_is_no_such_environment_is_unavailable_and_says_why(fields, reason):
    async with an_openenv_server(**fields) as server, playing(server, tries=2) as environment:
        failure = await failure_of(environment)
    assert failure.kind == "environment_unavailable"
    assert reason in failure.reason


async def test_a_server_that_is_down_fails_episodes_at_once_and_runs_them_when_it_is_back():
    server = OpenEnvTwin()
    await server.start()
    async with playing(server) as environment:
        await play(environment, "reward 1")
        await server.stop()
        for _ in range(3):
            assert (await failure_of(environment)).kind == "environment_unavailable"
        await server.start(server.port)
        results: list[StepResult] = []
        while not results:
            with suppress(EnvironmentFailure):
                results = await play(environment, "reward 2")
            await asyncio.sleep(0.05)
    assert [result.reward for result in results] == [2.0]
    await server.stop()


async def test_all_samples_of_a_group_are_run_when_a_server_is_tried_again_or_none_is():
    server = OpenEnvTwin()
    await server.start()
    async with playing(server) as environment:
        await play(environment, "reward 1")
        await server.stop()
        server.num_begun = 0
        for _ in range(5):
            with pytest.raises(ExceptionGroup):
                await a_group(environment)
        await server.start(server.port)
        while not (server.num_begun and not server.num_sessions):
            with suppress(ExceptionGroup):
                await a_group(environment)
            await asyncio.sleep(0.05)
    assert server.num_begun == 8
    await server.stop()


async def a_group(environment: Environment) -> None:
    """Eight episodes at once; if one fails, the others are cancelled."""
    async with asyncio.TaskGroup() as samples:
        for _ in range(8):
            samples.create_task(play(environment, "reward 1"))


async def test_episodes_begin_at_the_other_server_while_one_is_down():
    async with an_openenv_server() as gone:
        pass
    async with an_openenv_server() as server, playing(server, gone) as environment:
        results = await asyncio.gather(*(play(environment, f"reward {number}") for number in range(50)))
    assert [steps[-1].reward for steps in results] == list(range(50))


@pytest.mark.parametrize("url", ["openenv+ws:", "openenv+ws:h", "openenv+ws://", "openenv+ws://a:b@h"])
def test_a_url_that_names_no_server_is_refused(url):
    with pytest.raises(ValueError, match=r"must look like|user name"):
        environment_at(url)
