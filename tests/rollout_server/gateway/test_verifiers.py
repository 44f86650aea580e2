"""verifiers+tcp against a twin of the server: what it says, good and bad, and what becomes of the episodes."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from common.environments import EnvironmentSettings
from common.trajectory import FinishReason
from rollout_server.environments import environment_at
from rollout_server.environments.verifiers_tcp import VerifiersTcp
from rollout_server.lease_failure import LeaseFailure
from tests.environments.servers import a_free_port
from tests.rollout_server.gateway.builders_gateway import a_gateway, episode_of, sampled_text
from tests.rollout_server.verifiers_twin import DONE, Handler, Run, Twin, a_verifiers_server, answers, packed


@asynccontextmanager
async def an_environment(url: str, **settings: Any) -> AsyncIterator[tuple[Any, Any]]:
    values = {"episode_timeout_s": 5.0, "step_timeout_s": 1.0, "tries": 1} | settings
    async with a_gateway() as gateway, environment_at(url, EnvironmentSettings(**values)) as environment:
        yield environment, gateway


@asynccontextmanager
async def a_server(handler: Handler, **settings: Any) -> AsyncIterator[tuple[Any, Any, Twin]]:
    async with a_verifiers_server(handler) as twin, an_environment(twin.url, **settings) as (environment, gateway):
        yield environment, gateway, twin


async def failure_at(environment: Any, gateway: Any, *texts: Any) -> LeaseFailure:
    with pytest.raises(LeaseFailure) as caught:
        await episode_of(environment, gateway, *texts or ("5",))
    assert "0 sessions" in repr(gateway)
    return caught.value


async def failures_of(handlers: Iterable[Handler], *texts: Any, **settings: Any) -> list[LeaseFailure]:
    """One episode of each, at the same server."""
    waiting = list(handlers)
    num_handlers = len(waiting)

    async def handler(run: Run) -> None:
        await waiting.pop(0)(run)

    async with a_server(handler, **settings) as (environment, gateway, _):
        failures = [await failure_at(environment, gateway, *texts) for _ in range(num_handlers)]
        assert "0 requests" in repr(environment)
        return failures


def ending(**changes: Any) -> Handler:
    """An agent that asks once, and an end with these fields of its trace."""

    async def handler(run: Run) -> None:
        await run.ask()
        await run.grow(set=DONE | changes)
        await run.finish()

    return handler


# --- good ------------------------------------------------------------------------------------------------------------


async def test_the_server_plays_the_row_through_the_gateway_and_the_weighted_sum_of_its_rewards_is_the_reward():
    async with a_server(answers) as (environment, gateway, twin):
        [right] = await episode_of(environment, gateway, "5")
        [wrong] = await episode_of(environment, gateway, "6")
    assert (right.reward, wrong.reward) == (1.5, 1.0)
    assert sampled_text(right) == "5<|im_end|>"
    request = twin.asked[0].request
    assert (request["task_data"], request["model"], request["sampling"]) == ({"prompt": "2+3"}, "policy", {})
    assert request["client"]["type"] == "eval"
    assert request["client"]["api_key_var"] == "COUNTERCURRENT_NO_KEY"
    assert request["client"]["base_url"] != twin.asked[1].request["client"]["base_url"]


async def test_several_calls_of_one_trace_are_one_trajectory():
    async def handler(run: Run) -> None:
        await run.ask(times=2)
        await run.grow(calls=2, set=DONE)
        await run.finish(traces=[{"id": "t", "nodes": 4, "calls": 2}])

    async with a_server(handler) as (environment, gateway, _):
        [trajectory] = await episode_of(environment, gateway, "4", "5")
    assert sampled_text(trajectory) == "4<|im_end|>5<|im_end|>"


@pytest.mark.parametrize("changes", [{"stop_condition": "max_turns"}, {"is_timeout": True}])
async def test_what_reached_a_limit_and_was_rewarded_is_truncated(changes):
    async with a_server(ending(**changes)) as (environment, gateway, _):
        [trajectory] = await episode_of(environment, gateway, "5")
    assert (trajectory.reward, trajectory.finish_reason) == (1.0, FinishReason.TRUNCATED)


# --- bad rewards -----------------------------------------------------------------------------------------------------


BAD_REWARDS: list[Any] = [
    None, {}, {"score": None}, {"score": math.nan}, {"score": math.inf}, {"score": "1.0"}, {"score": True},
    {"score": 1e30}, {"score": [1.0]}, {"score": 1.0, "weight": math.nan}, {"score": 1.0, "weight": "1"},
    {"score": 1.0, "weight": None}, {"score": 1e5, "weight": 1e5},
]  # fmt: skip


async def test_what_is_no_plausible_reward_is_a_failure():
    good = {"score": 1.0, "weight": 1.0}
    failures = await failures_of(ending(rewards={"good": good, "bad": reward}) for reward in BAD_REWARDS)
    assert [failure.kind for failure in failures] == ["bad_reward"] * len(BAD_REWARDS)


async def failed(run: Run) -> None:
    await run.ask()
    errors = [{"type": "TaskError", "message": "KeyError: 'answer'", "traceback": "..."}]
    await run.grow(errors=errors, set={"ok": False, "rewards": {}})
    await run.finish(head={"ok": False, "errors": []})


async def failed_with_a_reward(run: Run) -> None:
    await run.ask()
    await run.grow(errors=[{"type": "TaskError", "message": "late"}], set=DONE | {"ok": False})
    await run.finish()


async def failed_as_an_episode(run: Run) -> None:
    await run.ask()
    await run.grow(set=DONE)
    await run.finish(head={"ok": False, "errors": [{"type": "EnvError", "message": "boom"}]})


async def not_ok(run: Run) -> None:
    await run.ask()
    await run.grow(set=DONE)
    await run.finish(head={"ok": False, "errors": []})


async def began_anew(run: Run) -> None:
    """Its reward is that of the second attempt alone."""
    await run.ask(times=2)
    await run.grow("first")
    await run.send(b"delta", packed({"trace": "first", "discard": True}))
    await run.grow(set=DONE)
    await run.finish()


async def asked_somebody_else(run: Run) -> None:
    await run.ask()
    await run.grow(calls=2, set=DONE)
    await run.finish(traces=[{"id": "t", "nodes": 4, "calls": 2}])


async def has_two_agents(run: Run) -> None:
    await run.ask(times=2)
    await run.grow(set=DONE)
    await run.grow("u", set=DONE)
    await run.finish(traces=[{"id": "t", "nodes": 2, "calls": 1}, {"id": "u", "nodes": 2, "calls": 1}])


async def lost_a_part(run: Run) -> None:
    await run.ask()
    await run.grow(set=DONE)
    await run.finish(traces=[{"id": "t", "nodes": 3, "calls": 1}])


async def never_asked(run: Run) -> None:
    await run.grow(calls=0, set=DONE)
    await run.finish(traces=[{"id": "t", "nodes": 0, "calls": 0}])


async def refused(run: Run) -> None:
    await run.send(b"reply", packed({"success": False, "error": "KeyError: 3"}))


async def says_news(run: Run) -> None:
    await run.send(b"news", packed({}))


async def has_no_head(run: Run) -> None:
    await run.send(b"reply", packed({"success": True}))


UNSOUND: dict[Handler, str] = {
    failed: "TaskError: KeyError",
    failed_with_a_reward: "TaskError: late",
    failed_as_an_episode: "EnvError: boom",
    not_ok: "the rollout failed",
    began_anew: "2 answers, and the server counts 1",
    asked_somebody_else: "1 answers, and the server counts 2",
    has_two_agents: "2 agents",
    lost_a_part: "lost",
    never_asked: "without a single answer",
    refused: "KeyError: 3",
    has_no_head: "no reason",
    says_news: "what is no answer",
}


async def test_what_is_not_sound_is_a_failure_that_says_why():
    failures = await failures_of(UNSOUND, "4", "5")
    for failure, says in zip(failures, UNSOUND.values(), strict=True):
        assert failure.kind == "environment_error"
        assert says in failure.reason


async def test_a_rollout_without_rewards_is_not_worth_zero_and_one_that_took_too_long_is_a_time_out():
    failures = await failures_of([ending(rewards={}), ending(ok=False, is_timeout=True)])
    assert [failure.kind for failure in failures] == ["bad_reward", "environment_timeout"]


async def test_a_row_that_the_server_does_not_want_is_a_bad_row():
    async def handler(run: Run) -> None:
        await run.send(b"reply", packed({"success": False, "error": "ValidationError: answer: Field required"}))

    [failure] = await failures_of([handler])
    assert (failure.kind, "Field required" in failure.reason) == ("bad_row", True)


# --- bad bytes -------------------------------------------------------------------------------------------------------


GARBAGE = [
    b"", b"\xc1", b"\x91" * 100_000, packed(1.0), packed({"trace": 3, "success": "yes"}),
    packed({"trace": "t", "set": {"rewards": [1.0]}, "success": True, "head": 1}), packed({"x": "y" * (1 << 20)}),
]  # fmt: skip


@pytest.mark.parametrize("kind", [b"delta", b"reply"])
async def test_garbage_fails_its_own_episode_and_the_run_is_cancelled(kind):
    async def handler(run: Run) -> None:
        number = len(run.server.asked) - 1
        if number < len(GARBAGE):
            await run.send(kind, GARBAGE[number])
            await asyncio.Event().wait()
        await answers(run)

    async with a_server(handler, max_reply_bytes=1 << 19) as (environment, gateway, twin):
        for _ in GARBAGE:
            assert (await failure_at(environment, gateway)).kind == "environment_error"
        [trajectory] = await episode_of(environment, gateway, "5")
    assert trajectory.reward == 1.5
    sent = [run.id.decode() for run in twin.asked[:-1]]
    assert twin.cancelled == (sent if kind == b"delta" else sent[-1:])  # what replied has ended, unless it is too large


async def test_what_is_far_too_large_is_not_even_received_and_the_next_episode_has_a_new_connection():
    async def handler(run: Run) -> None:
        if len(run.server.asked) == 1:
            await run.ask()
            await run.send(b"delta", b"x" * (100 << 20))
            await asyncio.Event().wait()
        await answers(run)

    async with a_server(handler, max_reply_bytes=1 << 19) as (environment, gateway, twin):
        failure = await failure_at(environment, gateway)
        assert (failure.kind, "in the middle" in failure.reason) == ("environment_error", True)
        [trajectory] = await episode_of(environment, gateway, "5")
        assert trajectory.reward == 1.5
        assert twin.cancelled == [twin.asked[0].id.decode()]


async def test_a_reply_that_comes_too_late_or_to_another_request_is_nobodys():
    late: list[Run] = []

    async def handler(run: Run) -> None:
        if not late:
            late.append(run)
            await asyncio.Event().wait()
        for send in (late[0].finish, Run(run.server, run.peer, b"f" * 32, {}).finish, late[0].grow):
            await send()
        await answers(run)
        await run.finish()

    async with a_server(handler, episode_timeout_s=0.3) as (environment, gateway, _):
        assert (await failure_at(environment, gateway)).kind == "environment_timeout"
        [trajectory] = await episode_of(environment, gateway, "6")
        assert trajectory.reward == 1.0
        # Four of these, and the reply to the first run, which was cancelled.
        assert " 0 requests, 5 answers to nothing" in repr(environment)


# --- down ------------------------------------------------------------------------------------------------------------


async def test_while_the_server_is_down_its_tasks_wait_and_they_go_on_once_it_is_up():
    port = a_free_port()
    async with an_environment(f"verifiers+tcp://127.0.0.1:{port}") as (environment, gateway):
        for _ in range(2):
            failure = await failure_at(environment, gateway)
            assert (failure.kind, "nobody is there" in failure.reason) == ("environment_unavailable", True)
        async with a_verifiers_server(answers, port) as twin:
            assert len(await episode_of(environment, gateway, "5")) == 1
        assert (await failure_at(environment, gateway)).kind == "environment_unavailable"
        async with a_verifiers_server(answers, port) as twin:
            assert len(await episode_of(environment, gateway, "5")) == 1
            assert len(twin.asked) == 1


async def test_after_three_failures_it_is_left_alone_for_a_while():
    async with an_environment(f"verifiers+tcp://127.0.0.1:{a_free_port()}") as (environment, gateway):
        for _ in range(3):
            await failure_at(environment, gateway)
        async with a_verifiers_server(answers, int(environment.url.rpartition(":")[2])) as twin:
            assert (await failure_at(environment, gateway)).kind == "environment_unavailable"
            assert not twin.asked


async def test_a_server_that_dies_in_the_middle_fails_the_episodes_at_once():
    dead = asyncio.Event()

    async def handler(run: Run) -> None:
        await run.ask()
        dead.set()
        await asyncio.Event().wait()

    async with a_verifiers_server(handler) as twin, an_environment(twin.url, tries=5) as (environment, gateway):
        episode = asyncio.create_task(failure_at(environment, gateway))
        await dead.wait()
        twin.socket.close()
        assert (await episode).kind == "environment_error"


async def test_a_run_that_is_lost_before_the_policy_was_asked_is_repeated_and_the_lost_one_is_cancelled():
    async def handler(run: Run) -> None:
        if len(run.server.asked) == 1:
            await run.send(b"delta", b"x" * (3 << 20))
            await asyncio.Event().wait()
        await answers(run)

    async with a_server(handler, tries=2, max_reply_bytes=1 << 19) as (environment, gateway, twin):
        [trajectory] = await episode_of(environment, gateway, "5")
        assert trajectory.reward == 1.5
        assert twin.cancelled == [twin.asked[0].id.decode()]


async def test_a_server_that_answers_nothing_is_not_available():
    async with a_server(answers, step_timeout_s=0.1) as (environment, gateway, twin):
        twin.is_deaf = True
        failure = await failure_at(environment, gateway)
        assert (failure.kind, "no answer within 0.1 s" in failure.reason) == ("environment_unavailable", True)


async def test_one_that_falls_silent_in_the_middle_is_given_up_and_one_that_only_computes_is_not(monkeypatch):
    monkeypatch.setattr("rollout_server.environments.verifiers_server.ASK_AFTER_S", 0.02)

    async def handler(run: Run) -> None:
        await run.ask()
        await asyncio.sleep(0.3)
        await run.grow(set=DONE)
        await run.finish()

    async with a_server(handler, step_timeout_s=0.1) as (environment, gateway, twin):
        assert len(await episode_of(environment, gateway, "5")) == 1
        episode = asyncio.create_task(failure_at(environment, gateway))
        while len(twin.asked) < 2:
            await asyncio.sleep(0.001)
        twin.is_deaf = True
        failure = await episode
        assert (failure.kind, "said nothing for 0.1 s" in failure.reason) == ("environment_error", True)


async def test_a_port_that_speaks_something_else_is_no_server():
    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(speak, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with an_environment(f"verifiers+tcp://127.0.0.1:{port}") as (environment, gateway):
            assert (await failure_at(environment, gateway)).kind == "environment_unavailable"


async def test_no_more_episodes_than_allowed_are_sent_at_once():
    at_once = [0, 0]

    async def handler(run: Run) -> None:
        at_once[0] += 1
        at_once[1] = max(at_once)
        await answers(run)
        at_once[0] -= 1

    async with a_server(handler, max_concurrent=2) as (environment, gateway, twin):
        await asyncio.gather(*(episode_of(environment, gateway, "5") for _ in range(8)))
    assert (at_once, len(twin.asked)) == ([0, 2], 8)


async def test_closing_the_environment_ends_what_runs_and_tells_the_server():
    began = asyncio.Event()

    async def handler(run: Run) -> None:
        began.set()
        await asyncio.Event().wait()

    async with a_verifiers_server(handler) as twin:
        async with asyncio.TaskGroup() as tasks, a_gateway() as gateway:
            async with environment_at(twin.url) as environment:
                episode = tasks.create_task(failure_at(environment, gateway))
                await began.wait()
            assert "closed" in (await episode).reason
        while not twin.cancelled:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(
    "url",
    ["verifiers+tcp://", "verifiers+tcp://host", "verifiers+tcp://host:0", "verifiers+tcp://host:99999",
     "verifiers+tcp://host:1;tcp://other:2", "verifiers+tcp://me@host:1", "verifiers+tcp://*:1",
     "verifiers+tcp://host:1/path", "verifiers+tcp://:1"],
)  # fmt: skip
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="must look like"):
        VerifiersTcp(url, EnvironmentSettings())
