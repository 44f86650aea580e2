"""The Messages API and the Responses API, with the official clients: other words for the same chats."""

import json

import anthropic
import openai
import pytest

from tests.rollout_server.gateway.builders_gateway import error_of, played, sampled_text, text_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SAID = 'So <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
BOTH = f"{SAID}<|im_end|>It is 2.<|im_end|>"


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_with_the_anthropic_client_plays_one_growing_list(streams):
    tool = {"name": "add", "description": "sum", "input_schema": SCHEMA}

    async def agent(session, _):
        client = anthropic.AsyncAnthropic(
            base_url=session.base_url.removesuffix("/v1"), api_key=session.api_key, max_retries=0
        )

        async def ask(chat):
            asked = {"model": "policy", "max_tokens": 80, "system": "be brief", "messages": chat, "tools": [tool]}
            if not streams:
                return await client.messages.create(**asked)
            async with client.messages.stream(**asked) as stream:
                return await stream.get_final_message()

        chat = [{"role": "user", "content": "1+1?"}]
        message = await ask(chat)
        text, call = message.content
        assert (text.text, call.name, call.input, message.stop_reason) == ("So ", "add", {"a": 1}, "tool_use")
        chat.append({"role": "assistant", "content": [block.model_dump() for block in message.content]})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "2"}]}
        chat.append({"role": "user", "content": [result, {"type": "text", "text": "so?"}]})
        counted = await client.messages.count_tokens(model="policy", messages=chat, system="be brief", tools=[tool])
        message = await ask(chat)
        assert (message.content[0].text, message.stop_reason) == ("It is 2.", "end_turn")
        assert message.usage.input_tokens == counted.input_tokens
        assert message.usage.output_tokens == len("It is 2.") + 1
        await client.close()
        return 1.0

    [trajectory] = await played(agent, SAID, "It is 2.")
    assert sampled_text(trajectory) == BOTH
    heard = "<|im_start|>tool\n2<|im_end|>\n<|im_start|>user\nso?<|im_end|>\n"
    assert heard in text_of(trajectory.token_ids)
    assert "<|im_start|>system\nbe brief<|im_end|>" in text_of(trajectory.token_ids)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("remembers", [False, True])
async def test_an_agent_with_the_responses_api_plays_one_growing_list(streams, remembers):
    tool = {"type": "function", "name": "add", "parameters": SCHEMA, "strict": False}

    async def agent(session, _):
        client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0)

        async def ask(items, **more):
            asked = {"model": "policy", "instructions": "be brief", "input": items, "tools": [tool], **more}
            if not streams:
                return await client.responses.create(**asked)
            async with client.responses.stream(**asked) as stream:
                return await stream.get_final_response()

        response = await ask("1+1?")
        said, call = response.output
        assert (said.content[0].text, call.name, json.loads(call.arguments)) == ("So ", "add", {"a": 1})
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        if remembers:
            response = await ask([result], previous_response_id=response.id)
        else:
            echoed = [item.model_dump(exclude_none=True) for item in response.output]
            response = await ask([{"role": "user", "content": "1+1?"}, *echoed, result])
        assert (response.output_text, response.status) == ("It is 2.", "completed")
        await client.close()
        return 1.0

    [trajectory] = await played(agent, SAID, "It is 2.")
    assert sampled_text(trajectory) == BOTH
    assert text_of(trajectory.token_ids).count("be brief") == 1


async def test_how_an_answer_ended_is_told_in_each_apis_words():
    async def agent(session, client):
        asked = {"max_tokens": 80, "messages": [{"role": "user", "content": "x"}], "stop_sequences": ["END"]}
        message = (await client.post("/messages", json=asked)).json()
        assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "END")
        message = (await client.post("/messages", json=asked)).json()
        assert (message["stop_reason"], message["content"]) == ("max_tokens", [{"type": "text", "text": "cut"}])
        response = (await client.post("/responses", json={"input": "x"})).json()
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        return 1.0

    await played(agent, "the END.", "cut~", "cut~")


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/messages", b"", 400, "invalid_request"),
        ("/messages", {"messages": []}, 400, "invalid_request"),
        ("/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request"),
        ("/messages", {"messages": [USER], "system": [{"type": "tool_use"}]}, 400, "invalid_request"),
        ("/messages", {"messages": [USER], "tools": [{"type": "bash"}]}, 400, "invalid_request"),
        ("/messages", {"messages": [USER], "tool_choice": {"type": "any"}}, 400, "unsupported_parameter"),
        ("/messages/count_tokens", {"messages": [USER | {"content": "x" * 20_000}]}, 400, "context_length_exceeded"),
        ("/responses", {"input": []}, 400, "invalid_request"),
        ("/responses", {"input": [{"type": "web_search_call"}]}, 400, "invalid_request"),
        ("/responses", {"input": "x", "tools": [{"type": "web_search"}]}, 400, "invalid_request"),
        ("/responses", {"input": "x", "text": {"format": {"type": "json_object"}}}, 400, "unsupported_parameter"),
        ("/responses", {"input": "x", "previous_response_id": "resp_no"}, 404, "not_found"),
    ],
)
async def test_what_makes_no_sense_is_refused(path, body, status, code):
    async def agent(session, client):
        assert await error_of(client, path, body) == (status, code)
        await client.post("/completions", json={"prompt": "x"})
        return 1.0

    assert len(await played(agent, "y")) == 1
