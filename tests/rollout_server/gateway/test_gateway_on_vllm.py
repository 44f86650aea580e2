"""Agents with the official openai client on the real engine: each token's evidence is that of the weights it claims."""

import asyncio
import json
from typing import Any

import numpy as np
import openai
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from common.environments import EnvironmentSettings
from common.staleness import NOT_SAMPLED
from rollout_server.gateway.gateway import Gateway, GatewaySettings
from rollout_server.gateway.session import Session
from rollout_server.vllm_tools import VllmTools
from tests.models import END_IDS, TOKENIZER_EOS_ID, VOCAB_SIZE, forward_logprobs
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine
from tests.rollout_server.gateway.builders_gateway import AgentHere, a_runner, user
from tests.rollout_server.test_episodes import a_lease

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.parametrize("live", ["tied"], indirect=True)]

TOLERANCE = 1e-4
CALL = '<tool_call>{"name":"add","arguments":{"a":1}}</tool_call>'
TOOL: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TEMPLATE = (
    "{% if tools %}w90 {% endif %}{% for message in messages %}"
    "{{ 'w93' if message.role == 'assistant' else 'w91' }} {{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    ' <tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
    "{% endfor %}<eos> {% endfor %}{% if add_generation_prompt %}w93 {% endif %}"
)
CALLS_FROM = 40  # of the tiny model's words, those from here on are tool calls


def words() -> PreTrainedTokenizerFast:
    """A word for each id. A random model says many of the later ones: they are calls."""
    vocab = {"<pad>": 0, "<unk>": 1, "<eos>": TOKENIZER_EOS_ID}
    vocab |= {f"w{i}" if i < CALLS_FROM or i > 85 else CALL.replace("1}", f"{i}}}"): i for i in range(3, VOCAB_SIZE)}
    fast = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = WhitespaceSplit()
    fast.decoder = decoders.WordPiece()  # words with a space between them
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


async def play(session: Session, turns: int, update: Any) -> int:
    """An agent as people write them; how many calls of tools it has answered."""
    num_calls = 0
    chat: list[Any] = [user("w7 w8 w9")]
    async with openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key, max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == [session.model]
        for turn in range(turns):
            if turn % 2 == 0:
                completion = await client.chat.completions.create(model="policy", messages=chat, tools=[TOOL])
                message = completion.choices[0].message
            else:
                async with client.chat.completions.stream(model="policy", messages=chat, tools=[TOOL]) as stream:
                    async for _ in stream:
                        pass
                    message = (await stream.get_final_completion()).choices[0].message
            chat.append(message.model_dump(exclude_none=True))
            for call in message.tool_calls or []:
                assert json.loads(call.function.arguments)["a"] >= CALLS_FROM
                chat.append({"role": "tool", "tool_call_id": call.id, "content": "w30"})
                num_calls += 1
            chat.append(user("w31 w32"))
            await update()
    return num_calls


async def test_openai_clients_with_tools_and_streams_get_tokens_with_the_evidence_of_their_weights(live: LiveEngine):
    await live.load_next()
    first_version = live.engine.loaded_version
    tokenizer = words()
    num_calls = num_turns = 0

    async def update() -> None:
        nonlocal num_turns
        num_turns += 1
        if num_turns == 8:  # while other episodes sample
            await live.load_next()

    async def agent(session: Session, client: Any) -> float:
        nonlocal num_calls
        num_calls += await play(session, 3, update)
        return 0.5

    environment = AgentHere(agent, EnvironmentSettings())
    tools = await asyncio.to_thread(VllmTools, "hermes", tokenizer)
    async with Gateway(GatewaySettings(), tools) as gateway:
        runner = a_runner(
            live.engine, environment, gateway, tokenizer=tokenizer, max_new_tokens=40, max_model_len=MAX_MODEL_LEN
        )
        lease = a_lease(environment=environment.url, group_size=8, min_version=first_version)
        trajectories = (await runner.run(lease)).trajectories
    assert sum(trajectory.turns for trajectory in trajectories) == 24
    assert num_calls > 0
    assert any(trajectory.turns == 3 for trajectory in trajectories)
    assert any(len(trajectory.version_runs()) == 2 for trajectory in trajectories)
    for trajectory in trajectories:
        np.testing.assert_array_equal(trajectory.token_versions != NOT_SAMPLED, trajectory.loss_mask)
        for version, _ in trajectory.version_runs():
            expected = forward_logprobs(live.models[version], trajectory.token_ids, temperature=1.0)
            of_version = trajectory.token_versions == version
            assert np.abs(expected - trajectory.behavior_logprobs[1:])[of_version[1:]].max() < TOLERANCE


async def test_texts_and_stop_texts_by_the_official_client(live: LiveEngine):
    await live.load_next()

    async def agent(session: Session, client: Any) -> float:
        async with openai.AsyncOpenAI(base_url=session.url, api_key="unused", max_retries=0) as official:
            whole = await official.completions.create(model="policy", prompt="w7 w8", max_tokens=20, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in whole])
            assert text
            with pytest.raises(openai.BadRequestError, match="response_format"):
                await official.chat.completions.create(
                    model="policy", messages=[user("w7")], response_format={"type": "json_object"}
                )
            with pytest.raises(openai.BadRequestError) as caught:
                await official.completions.create(model="policy", prompt="w7 " * 600)
            assert caught.value.code == "context_length_exceeded"
        return 1.0

    async with Gateway(GatewaySettings()) as gateway:
        environment = AgentHere(agent, EnvironmentSettings())
        runner = a_runner(live.engine, environment, gateway, tokenizer=words(), max_model_len=MAX_MODEL_LEN)
        lease = a_lease(environment=environment.url, group_size=1, min_version=live.engine.loaded_version)
        [trajectory] = (await runner.run(lease)).trajectories
    assert 0 < trajectory.num_sampled_tokens <= 20
    assert not set(END_IDS) & set(trajectory.token_ids[:-1].tolist())
