"""A gateway over an engine that says what the test tells it to, and agents that speak to it in plain HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Self

import httpx
import numpy as np
from tokenizers import Regex, decoders
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from common.environments import EnvironmentSettings
from common.trajectory import Trajectory
from rollout_server.environments.environment import Outcome, Row
from rollout_server.episodes import EpisodeRunner
from rollout_server.gateway.gateway import Gateway, GatewaySettings
from rollout_server.gateway.session import Session
from rollout_server.inference import Completion, Sampling
from tests.rollout_server.test_episodes import a_lease, at_once

EOS_ID = 1
MAX_MODEL_LEN = 2048
CHATML = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
THINKING = CHATML.replace(
    "{{ message.content }}",
    "{{ message.content.split('</think>')[-1] if message.role == 'assistant' else message.content }}",
)


@cache
def a_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token for each character, as transformers has it."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: index for index, token in enumerate(["<|im_start|>", "<|im_end|>", "<unk>", *characters])}
    fast = FastTokenizer(WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|im_end|>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


def ids_of(text: str) -> list[int]:
    return list(a_tokenizer().encode(text, add_special_tokens=False))


def text_of(ids: Any) -> str:
    return str(a_tokenizer().decode(list(ids), skip_special_tokens=False))


@dataclass
class SayingEngine:
    """Says its texts one after the other; a text that ends with ~ is cut there. Its weights may change meanwhile."""

    texts: list[Any] = field(default_factory=list)  # an exception is raised, a function awaited before the next
    loaded_version: int = 0
    max_model_len: int = MAX_MODEL_LEN
    vocab_size: int = 99
    prompts: list[str] = field(default_factory=list)
    asked: list[Sampling] = field(default_factory=list)
    num_running: int = 0
    num_tokens: int = 0

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        del request_id
        self.prompts.append(text_of(prompt_ids))
        self.asked.append(sampling)
        self.num_running += 1
        try:
            if callable(self.texts[0]):
                await self.texts.pop(0)()
        finally:
            self.num_running -= 1
        text = self.texts.pop(0)
        if isinstance(text, Exception):
            raise text
        ids = ids_of(text.removesuffix("~")) + ([] if text.endswith("~") else [EOS_ID])
        self.num_tokens += len(ids)
        half = len(ids) // 2
        versions = [self.loaded_version] * half
        self.loaded_version += 1  # in the middle of each answer
        versions += [self.loaded_version] * (len(ids) - half)
        return Completion(
            token_ids=np.array(ids, dtype=np.int32),
            logprobs=-np.arange(self.num_tokens - len(ids) + 1, self.num_tokens + 1, dtype=np.float32),
            token_versions=np.array(versions, dtype=np.int32),
            terminated=not text.endswith("~"),
        )


def a_client(url: str, api_key: str = "") -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=60, verify=False, trust_env=False)


Agent = Callable[[Session, httpx.AsyncClient], Awaitable[Any]]


@dataclass
class AgentHere:
    """An environment whose agent is a function of the test."""

    agent: Agent
    settings: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    url: str = "here:"
    sessions: list[Session] = field(default_factory=list)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def play(self, row: Row, session: Session, *, seed: int) -> Outcome:
        self.sessions.append(session)
        async with a_client(session.base_url, session.api_key) as client:
            reward = await self.agent(session, client)
        return reward if isinstance(reward, Outcome) else Outcome(reward=reward)


@asynccontextmanager
async def a_gateway(**settings: Any) -> AsyncIterator[Gateway]:
    async with asyncio.timeout(60), Gateway(GatewaySettings(**settings)) as gateway:
        yield gateway


def a_runner(engine: Any, environment: Any, gateway: Gateway, **changes: Any) -> EpisodeRunner:
    settings: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 100, "max_model_len": MAX_MODEL_LEN}
    tokenizer = changes.pop("tokenizer", None) or a_tokenizer()
    return EpisodeRunner(
        engine,
        {environment.url: environment},
        tokenizer,
        wait_for_version=at_once,
        gateway=gateway,
        **settings | changes,
    )


async def played(
    agent: Agent,
    *texts: Any,
    settings: EnvironmentSettings | None = None,
    engine: SayingEngine | None = None,
    **changes: Any,
) -> list[Trajectory]:
    """The trajectories of one episode of the agent, to which the policy says the texts."""
    environment = AgentHere(agent, settings or EnvironmentSettings())
    async with a_gateway() as gateway:
        return await episode_of(environment, gateway, *texts, engine=engine, **changes)


async def episode_of(
    environment: Any,
    gateway: Gateway,
    *texts: Any,
    engine: SayingEngine | None = None,
    lease: dict[str, Any] | None = None,
    **changes: Any,
) -> list[Trajectory]:
    """Likewise, in an environment that has been entered."""
    runner = a_runner(engine or SayingEngine(list(texts)), environment, gateway, **changes)
    fields: dict[str, Any] = {"environment": environment.url, "group_size": 1, "prompt": "2+3"}
    return list((await runner.run(a_lease(**fields | (lease or {})))).trajectories)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


async def say(client: httpx.AsyncClient, messages: list[Any], **fields: Any) -> dict[str, Any]:
    """The policy's answer, which becomes part of the messages."""
    response = await client.post("/chat/completions", json={"model": "policy", "messages": messages} | fields)
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    messages.append(message)
    return dict(response.json())


async def error_of(client: httpx.AsyncClient, path: str, body: Any) -> tuple[int, str]:
    """Status and code of an answer that is an error."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = await client.post(path, content=content)
    assert response.status_code >= 400, response.text
    return response.status_code, response.json()["error"]["code"]


def sampled_text(trajectory: Trajectory) -> str:
    """What the policy sampled, in its order."""
    return text_of(trajectory.token_ids[trajectory.loss_mask])
