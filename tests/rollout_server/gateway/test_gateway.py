"""The gateway: what an agent asks of it, and the trajectories that its episodes become."""

import asyncio
import json

import httpx
import numpy as np
import pytest

from common.environments import EnvironmentSettings
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason
from rollout_server.environments.environment import Outcome
from rollout_server.gateway.routes import MAX_BODY_BYTES
from rollout_server.gateway.session import MAX_PARALLEL_CALLS
from rollout_server.inference import EngineError
from rollout_server.lease_failure import LeaseFailure
from tests.rollout_server.gateway.builders_gateway import (
    THINKING,
    SayingEngine,
    a_client,
    a_gateway,
    a_tokenizer,
    error_of,
    ids_of,
    played,
    sampled_text,
    say,
    text_of,
    user,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
HEAD = "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"


async def asks_twice(session, client):
    chat = [user("one")]
    await say(client, chat)
    chat.append(user("two"))
    await say(client, chat)
    return 0.5


# --- from calls to trajectories --------------------------------------------------------------------------------------


async def test_the_calls_of_a_chat_become_one_growing_list_of_ids_with_the_evidence_of_each_token():
    [trajectory] = await played(asks_twice, "first", "second")
    assert text_of(trajectory.token_ids) == (
        f"{HEAD}first<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nsecond<|im_end|>"
    )
    assert sampled_text(trajectory) == "first<|im_end|>second<|im_end|>"
    assert trajectory.behavior_logprobs[trajectory.loss_mask].tolist() == [-float(n) for n in range(1, 14)]
    assert trajectory.version_runs() == [(0, 3), (1, 6), (2, 4)]  # updates in the middle of each answer
    np.testing.assert_array_equal(trajectory.token_versions == NOT_SAMPLED, ~trajectory.loss_mask)
    assert (trajectory.reward, trajectory.turns, trajectory.continues) == (0.5, 2, False)
    assert trajectory.finish_reason is FinishReason.TERMINATED


async def test_every_call_is_sampled_as_the_run_says_with_a_seed_of_its_own():
    engine = SayingEngine(["a", "b", "c"])

    async def agent(session, client):
        await say(client, [user("x")], temperature=0.0, top_p=0.1, seed=3)
        await say(client, [user("x")], max_tokens=7)
        await say(client, [user("x")], max_completion_tokens=10**6)
        return 1.0

    await played(agent, engine=engine)
    assert [asked.temperature for asked in engine.asked] == [1.0, 1.0, 1.0]
    assert [asked.max_new_tokens for asked in engine.asked] == [100, 7, 100]
    assert len({asked.seed for asked in engine.asked}) == 3


async def test_what_was_sampled_stays_as_it_was_also_where_its_text_would_have_other_ids():
    strange = "a<|im_start|>b"  # a special token in the middle, which no agent is shown
    engine = SayingEngine([strange, "ok"])

    async def agent(session, client):
        chat = [user("one")]
        await say(client, chat)
        assert chat[-1]["content"] == "ab"
        chat.append(user("two"))
        await say(client, chat)
        return 1.0

    [trajectory] = await played(agent, engine=engine)
    assert sampled_text(trajectory) == f"{strange}<|im_end|>ok<|im_end|>"
    assert engine.prompts[1].startswith(f"{HEAD}{strange}<|im_end|>\n")


@pytest.mark.parametrize("changed", ["  first\n", [{"type": "text", "text": "first"}]])
async def test_white_space_and_another_form_of_the_same_words_are_no_other_history(changed):
    async def agent(session, client):
        chat = [user("one")]
        await say(client, chat)
        chat[-1] = {"role": "assistant", "content": changed}
        chat.append(user("two"))
        await say(client, chat)
        return 1.0

    assert len(await played(agent, "first ", "second")) == 1


async def test_a_history_that_the_agent_rewrote_is_a_trajectory_of_its_own():
    async def agent(session, client):
        chat = [user("one")]
        await say(client, chat)
        chat[-1] = {"role": "assistant", "content": "summary"}
        chat.append(user("two"))
        await say(client, chat)
        chat.append(user("three"))
        await say(client, chat)
        return 0.25

    first, second = await played(agent, "first", "second", "third")
    assert sampled_text(first) == "first<|im_end|>"
    assert sampled_text(second) == "second<|im_end|>third<|im_end|>"
    assert text_of(second.token_ids).startswith(f"{HEAD}summary<|im_end|>\n")
    assert (first.continues, second.continues) == (False, True)
    assert (first.reward, second.reward) == (0.25, 0.25)


async def test_a_template_that_drops_thoughts_forks():
    async def agent(session, client):
        await asks_twice(session, client)
        return 1.0

    first, second = await played(agent, "<think>hm</think>yes", "no", tokenizer=a_tokenizer(THINKING))
    assert sampled_text(first) == "<think>hm</think>yes<|im_end|>"
    assert text_of(second.token_ids).startswith(f"{HEAD}yes<|im_end|>\n")
    assert sampled_text(second) == "no<|im_end|>"


async def test_branches_from_one_history_train_each_token_once():
    async def agent(session, client):
        chat = [user("one")]
        await say(client, chat)
        await asyncio.gather(*(say(client, [*chat, user(text)]) for text in ("two", "three")))
        return 1.0

    trajectories = await played(agent, "first", "second", "third")
    assert sorted(sampled_text(each) for each in trajectories) == ["first<|im_end|>second<|im_end|>", "third<|im_end|>"]
    assert all("first<|im_end|>" in text_of(each.token_ids) for each in trajectories)


async def test_several_samples_of_one_request_are_trajectories_of_one_episode():
    async def agent(session, client):
        reply = await say(client, [user("one")], n=2)
        assert [choice["message"]["content"] for choice in reply["choices"]] == ["a", "b"]
        return 1.0

    first, second = await played(agent, "a", "b")
    assert [sampled_text(each) for each in (first, second)] == ["a<|im_end|>", "b<|im_end|>"]
    assert second.continues


async def test_a_text_that_goes_on_keeps_the_ids_of_what_was_sampled():
    async def agent(session, client):
        response = await client.post("/completions", json={"prompt": "12+3=", "max_tokens": 50, "logprobs": 1})
        [choice] = response.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("15", "length")
        assert choice["logprobs"]["tokens"] == ["1", "5"]
        again = await client.post("/completions", json={"prompt": f"12+3={choice['text']} and"})
        assert again.json()["choices"][0]["text"] == "so on"
        return 1.0

    [trajectory] = await played(agent, "15~", "so on")
    assert text_of(trajectory.token_ids) == "12+3=15 andso on<|im_end|>"
    assert sampled_text(trajectory) == "15so on<|im_end|>"


async def test_token_ids_may_be_given_and_had():
    async def agent(session, client):
        ids = ids_of("1+1=")
        response = await client.post("/completions", json={"prompt": ids, "return_token_ids": True})
        reply = response.json()
        assert reply["prompt_token_ids"] == ids
        ids += [*reply["choices"][0]["token_ids"], *ids_of(" 2+2=")]
        await client.post("/completions", json={"prompt": ids})
        return 1.0

    [trajectory] = await played(agent, "2", "4")
    assert sampled_text(trajectory) == "2<|im_end|>4<|im_end|>"


async def test_at_a_stop_text_the_answer_ends_and_what_would_have_come_is_nowhere():
    engine = SayingEngine(["do END more", "ok"])

    async def agent(session, client):
        chat = [user("one")]
        reply = await say(client, chat, stop=["END", "never"])
        assert chat[-1]["content"] == "do "
        assert reply["choices"][0]["finish_reason"] == "stop"
        chat.append(user("two"))
        await say(client, chat)
        return 1.0

    [trajectory] = await played(agent, engine=engine)
    assert sampled_text(trajectory) == "do ENDok<|im_end|>"
    assert trajectory.finish_reason is FinishReason.TERMINATED


@pytest.mark.parametrize(
    ("texts", "outcome", "reason"),
    [
        (["cut~"], Outcome(reward=1.0), FinishReason.TRUNCATED),
        (["whole"], Outcome(reward=1.0, truncated=True), FinishReason.TRUNCATED),
        (["whole"], Outcome(reward=1.0), FinishReason.TERMINATED),
    ],
)
async def test_an_episode_whose_last_answer_was_cut_is_truncated(texts, outcome, reason):
    async def agent(session, client):
        await say(client, [user("one")])
        return outcome

    [trajectory] = await played(agent, *texts)
    assert trajectory.finish_reason is reason


# --- tools -----------------------------------------------------------------------------------------------------------


async def test_tool_calls_are_parsed_and_their_ids_stay_however_the_template_would_write_them():
    said = 'Let me. <tool_call>{"name":"add","arguments":{"b":2,"a":1}}</tool_call>'

    async def agent(session, client):
        chat = [user("1+2?")]
        reply = await say(client, chat, tools=[TOOL])
        assert reply["choices"][0]["finish_reason"] == "tool_calls"
        [call] = chat[-1]["tool_calls"]
        assert (call["type"], call["function"]["name"], chat[-1]["content"]) == ("function", "add", "Let me. ")
        assert json.loads(call["function"]["arguments"]) == {"a": 1, "b": 2}
        chat.append({"role": "tool", "tool_call_id": call["id"], "content": "3"})
        await say(client, chat, tools=[TOOL])
        assert chat[-1]["content"] == "It is 3."
        return 1.0

    [trajectory] = await played(agent, said, "It is 3.")
    assert sampled_text(trajectory) == f"{said}<|im_end|>It is 3.<|im_end|>"
    assert "<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\nIt" in text_of(trajectory.token_ids)
    assert "Tools:" in text_of(trajectory.token_ids)


@pytest.mark.parametrize(
    ("said", "fields"),
    [
        ("<tool_call>{broken</tool_call>", {"tools": [TOOL]}),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', {"tools": [TOOL]}),
        ('<tool_call>{"name": "add"}</tool_call>', {"tools": [TOOL]}),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call>', {"tools": [TOOL], "tool_choice": "none"}),
        ('<tool_call>{"name": "add", "arguments": {}}</tool_call>', {}),
    ],
)
async def test_what_is_no_call_is_words(said, fields):
    async def agent(session, client):
        chat = [user("x")]
        reply = await say(client, chat, **fields)
        assert chat[-1] == {"role": "assistant", "content": said, "refusal": None}
        assert reply["choices"][0]["finish_reason"] == "stop"
        return 1.0

    await played(agent, said)


# --- forms of requests and replies -----------------------------------------------------------------------------------


async def test_a_stream_tells_the_same_in_events():
    said = 'So <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    async def agent(session, client):
        body = {"messages": [user("x")], "stream": True, "stream_options": {"include_usage": True}, "tools": [TOOL]}
        response = await client.post("/chat/completions", json=body)
        assert response.headers["content-type"].startswith("text/event-stream")
        *events, done, _ = response.text.split("\n\n")
        assert done == "data: [DONE]"
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert deltas[1] == {"content": "So "}
        assert (deltas[2]["tool_calls"][0]["index"], deltas[2]["tool_calls"][0]["function"]["name"]) == (0, "add")
        assert chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
        assert chunks[-1]["usage"]["completion_tokens"] == len(said) + 1
        return 1.0

    await played(agent, said)


async def test_log_probabilities_are_told():
    async def agent(session, client):
        reply = await say(client, [user("x")], logprobs=True)
        told = reply["choices"][0]["logprobs"]["content"]
        assert [(one["token"], one["logprob"]) for one in told] == [("y", -1.0), ("<|im_end|>", -2.0)]
        return 1.0

    await played(agent, "y")


async def test_the_session_may_be_named_by_the_path_alone():
    async def agent(session, client):
        async with a_client(session.url) as other:
            await say(other, [user("x")])
            models = (await other.get("/models")).json()
            assert [model["id"] for model in models["data"]] == [session.model]
            assert (await other.post("/rl/set_reward", json={"reward": 0.75})).json() == {"reward": 0.75}
        return session.outcome()

    [trajectory] = await played(agent, "y")
    assert trajectory.reward == 0.75


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/chat/completions", b"", 400, "invalid_request"),
        ("/chat/completions", b"\xff\xfe{}", 400, "invalid_request"),
        ("/chat/completions", b"[" * 100_000, 400, "invalid_request"),
        ("/chat/completions", {}, 400, "invalid_request"),
        ("/chat/completions", {"messages": []}, 400, "invalid_request"),
        ("/chat/completions", {"messages": "hi"}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [{"role": "judge", "content": "x"}]}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [user([{"type": "image_url"}])]}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [user("x")], "tools": [{"type": "web"}]}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [user("x")], "tools": [{"type": "function"}]}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [user("x")], "n": 1000}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [user("x")], "max_tokens": 0}, 400, "invalid_request"),
        ("/chat/completions", {"messages": [user("x")], "tool_choice": "required"}, 400, "unsupported_parameter"),
        ("/chat/completions", {"messages": [user("x")], "logit_bias": {"3": 5}}, 400, "unsupported_parameter"),
        (
            "/chat/completions",
            {"messages": [user("x")], "response_format": {"type": "json_object"}},
            400,
            "unsupported_parameter",
        ),
        ("/completions", {"prompt": ""}, 400, "invalid_request"),
        ("/completions", {"prompt": [-1]}, 400, "invalid_request"),
        ("/completions", {"prompt": [99]}, 400, "invalid_request"),
        ("/completions", {"prompt": ["a", "b"]}, 400, "invalid_request"),
        ("/completions", {"prompt": "x" * 3000}, 400, "context_length_exceeded"),
        ("/completions", {"prompt": "x" * 100_000}, 400, "context_length_exceeded"),
        ("/completions", b"{" + b" " * MAX_BODY_BYTES + b"}", 413, "request_too_large"),
        ("/rl/set_reward", {}, 422, "bad_reward"),
        ("/rl/set_reward", b'{"reward": NaN}', 400, "invalid_request"),
        ("/rl/set_reward", b"{", 400, "invalid_request"),
    ],
)
async def test_what_makes_no_sense_is_refused_with_the_reason_and_the_episode_goes_on(path, body, status, code):
    async def agent(session, client):
        assert await error_of(client, path, body) == (status, code)
        await say(client, [user("one")])
        return 1.0

    [trajectory] = await played(agent, "well")
    assert sampled_text(trajectory) == "well<|im_end|>"


async def test_a_text_that_cannot_fit_is_not_even_tokenized():
    async def agent(session, client):
        for path, asked in (
            ("/completions", {"prompt": "x" * 20_000}),
            ("/chat/completions", {"messages": [user("x" * 20_000)]}),
        ):
            response = await client.post(path, json=asked)
            assert "the prompt has 20000 characters" in response.json()["error"]["message"]
        await say(client, [user("one")])
        return 1.0

    await played(agent, "well")


@pytest.mark.parametrize("chat_template", [None, "{{ raise_exception('no') }}", "{{ messages.x.y }}"])
async def test_a_chat_that_the_template_cannot_render_is_refused(chat_template):
    async def agent(session, client):
        assert await error_of(client, "/chat/completions", {"messages": [user("x")]}) == (400, "invalid_request")
        await client.post("/completions", json={"prompt": "x"})
        return 1.0

    assert len(await played(agent, "y", tokenizer=a_tokenizer(chat_template))) == 1


# --- limits and keys -------------------------------------------------------------------------------------------------


async def test_after_the_last_turn_there_is_no_other_and_the_episode_is_truncated():
    async def agent(session, client):
        await asks_twice(session, client)
        body = {"messages": [user("x")]}
        assert await error_of(client, "/chat/completions", body) == (403, "max_turns")
        return 1.0

    [trajectory] = await played(agent, "a", "b", settings=EnvironmentSettings(max_turns=2))
    assert trajectory.finish_reason is FinishReason.TRUNCATED


async def test_a_key_opens_its_own_session_while_that_lasts():
    sessions = []
    closed = asyncio.Event()

    async def agent(session, client):
        sessions.append(session)
        async with a_client(session.base_url) as stranger:
            for headers in ({}, {"Authorization": "Bearer sk-wrong"}, {"x-api-key": ""}, {"Authorization": "Basic a"}):
                stranger.headers = httpx.Headers(headers)
                for path in ("/chat/completions", "/rl/set_reward", "/rl/end_session"):
                    assert await error_of(stranger, path, {}) == (401, "invalid_api_key")
                assert (await stranger.get("/models")).status_code == 401
        await say(client, [user("x")])
        await client.post("/rl/end_session", json={"reward": 0.5})
        body = {"messages": [user("x")]}
        assert await error_of(client, "/chat/completions", body) == (410, "session_ended")
        assert await error_of(client, "/rl/set_reward", {"reward": 1.0}) == (410, "session_ended")
        closed.set()
        return session.outcome()

    [trajectory] = await played(agent, "y")
    assert closed.is_set()
    assert trajectory.reward == 0.5


async def test_a_session_of_an_episode_that_is_over_says_so():
    async with a_gateway() as gateway:
        async with gateway.session(a_policy(), max_calls=3) as session:
            pass
        async with a_client(session.url) as client:
            assert await error_of(client, "/completions", {"prompt": "x"}) == (410, "session_ended")
        assert "0 sessions" in repr(gateway)


class a_policy:
    tokenizer = a_tokenizer()
    vocab_size = 99
    max_model_len = 64
    max_new_tokens = 8


async def test_a_flood_of_parallel_calls_is_refused_beyond_a_bound():
    gate = asyncio.Event()
    engine = SayingEngine([gate.wait] * MAX_PARALLEL_CALLS + ["y"] * MAX_PARALLEL_CALLS)

    refused = 0

    async def ask(client):
        nonlocal refused
        response = await client.post("/completions", json={"prompt": "x"})
        refused += response.status_code == 429
        if refused == 40:
            gate.set()
        return response.status_code

    async def agent(session, client):
        statuses = await asyncio.gather(*(ask(client) for _ in range(MAX_PARALLEL_CALLS + 40)))
        assert {status: statuses.count(status) for status in set(statuses)} == {200: MAX_PARALLEL_CALLS, 429: 40}
        return 1.0

    settings = EnvironmentSettings(max_turns=1000)
    assert len(await played(agent, engine=engine, settings=settings)) == MAX_PARALLEL_CALLS


async def test_a_call_whose_agent_hangs_up_is_aborted_in_the_engine_and_the_retry_alone_is_trained():
    begun, never = asyncio.Event(), asyncio.Event()

    async def begin():
        begun.set()
        await never.wait()

    engine = SayingEngine([begin, "second"])

    async def agent(session, client):
        async with asyncio.TaskGroup() as tasks:
            call = tasks.create_task(client.post("/completions", json={"prompt": "x"}))
            await begun.wait()
            call.cancel()
        while engine.num_running:
            await asyncio.sleep(0.001)
        await client.post("/completions", json={"prompt": "x"})
        return 1.0

    [trajectory] = await played(agent, engine=engine, settings=EnvironmentSettings(max_turns=1))
    assert sampled_text(trajectory) == "second<|im_end|>"


async def test_an_engine_that_dies_ends_the_episode_whatever_its_agent_does():
    statuses = []

    async def agent(session, client):
        response = await client.post("/completions", json={"prompt": "x"})
        statuses.append(response.status_code)
        await asyncio.Event().wait()

    with pytest.raises(LeaseFailure) as caught:
        await played(agent, EngineError("it is gone"))
    assert (caught.value.kind, caught.value.reason) == ("engine_error", "it is gone")


async def test_an_agent_that_ends_without_an_answer_of_the_policy_has_no_trajectory():
    async def agent(session, client):
        return 1.0

    with pytest.raises(LeaseFailure) as caught:
        await played(agent)
    assert caught.value.kind == "environment_error"


async def test_calls_that_run_when_the_episode_ends_are_aborted_and_refused():
    begun, never = asyncio.Event(), asyncio.Event()

    async def begin():
        begun.set()
        await never.wait()

    engine = SayingEngine(["y", begin])
    late = []

    async def agent(session, client):
        await say(client, [user("x")])
        late.append(asyncio.create_task(ask_again(session)))
        await begun.wait()
        return 1.0

    async def ask_again(session):
        async with a_client(session.url) as client:
            return await error_of(client, "/completions", {"prompt": "x"})

    [trajectory] = await played(agent, engine=engine)
    assert sampled_text(trajectory) == "y<|im_end|>"
    assert engine.num_running == 0
    assert await late[0] == (410, "session_ended")
