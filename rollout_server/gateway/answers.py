"""Answers: what the policy says to a request, as ids with their evidence and as the agent is given it."""

import asyncio
import uuid
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rollout_server.gateway.api_error import ApiError
from rollout_server.gateway.api_requests import (
    ChatRequest,
    CompletionRequest,
    FunctionCall,
    Message,
    Request,
    ToolCall,
)
from rollout_server.gateway.chats import Spoken
from rollout_server.gateway.session import Session
from rollout_server.gateway.tools import Parsed, ToolParser
from rollout_server.inference import Completion
from rollout_server.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answer:
    """One sample of the policy."""

    prompt_ids: np.ndarray  # [T] int32
    completion: Completion
    text: str  # without special tokens, up to a stop text
    message: Message | None  # in a chat
    finish_reason: str  # as OpenAI names it
    stop_text: str | None  # what ended it

    def tokens(self, tokenizer: Tokenizer) -> list[str]:
        """Each sampled token as text."""
        return [tokenizer.decode([token], skip_special_tokens=False) for token in self.completion.token_ids.tolist()]


async def answer_chat(session: Session, parser: ToolParser, request: ChatRequest) -> list[Answer]:
    """As many as the request asks for, recorded; raises ApiError."""
    tools = request.usable_tools
    tokenizer = session.policy.tokenizer
    async with session.call():
        prompt_ids = session.chats.chat_ids(request.messages, tools)
        answers = []
        for completion in await _sample(session, prompt_ids, request, request.limit):
            heard, text, stop_text = _heard(completion, request, tokenizer)
            parsed = Parsed(content=text)
            if tools:
                parsed = _parsed(heard, text, parser, tools, tokenizer, stop_text=stop_text)
            answer = Answer(
                prompt_ids=prompt_ids,
                completion=heard,
                text=text,
                message=_message(parsed),
                finish_reason="tool_calls" if parsed.calls else _finish_reason(completion, stop_text=stop_text),
                stop_text=stop_text,
            )
            _remember_chat(session, request, tools, answer, parsed)
            answers.append(answer)
        _record(session, answers)
        return answers


def _remember_chat(
    session: Session, request: ChatRequest, tools: Sequence[dict[str, object]], answer: Answer, parsed: Parsed
) -> None:
    assert answer.message is not None, "an answer in a chat has one"
    ids = answer.completion.token_ids
    spoken = Spoken(
        token_ids=np.concatenate([answer.prompt_ids, ids]).astype(np.int32),
        end=session.policy.tokenizer.decode(ids[-1:].tolist(), skip_special_tokens=False),
        parsed=parsed,
    )
    session.chats.remember(request.messages, tools, answer.message, spoken)


async def answer_completion(session: Session, request: CompletionRequest) -> list[Answer]:
    """Likewise."""
    prompt = request.prompt
    async with session.call():
        prompt_ids = session.chats.text_ids(prompt) if isinstance(prompt, str) else _given_ids(session, prompt or [])
        answers = []
        for completion in await _sample(session, prompt_ids, request, request.limit):
            heard, text, stop_text = _heard(completion, request, session.policy.tokenizer)
            if isinstance(prompt, str):
                session.chats.remember_text(prompt + text, np.concatenate([prompt_ids, heard.token_ids]))
            answer = Answer(
                prompt_ids=prompt_ids,
                completion=heard,
                text=text,
                message=None,
                finish_reason=_finish_reason(completion, stop_text=stop_text),
                stop_text=stop_text,
            )
            answers.append(answer)
        _record(session, answers)
        return answers


async def _sample(
    session: Session, prompt_ids: np.ndarray, request: Request, limit: int | None
) -> Sequence[Completion]:
    """Raises ApiError of the first that fails; the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as tasks:
            samples = [
                tasks.create_task(session.sample(prompt_ids, max_new_tokens=limit)) for _ in range(request.n or 1)
            ]
    except ExceptionGroup as failures:
        first = failures.exceptions[0]
        if isinstance(first, ApiError):
            raise first from first.__cause__
        raise
    return [sample.result() for sample in samples]


def _given_ids(session: Session, ids: Sequence[int]) -> np.ndarray:
    if min(ids) < 0 or max(ids) >= session.policy.vocab_size:
        raise ApiError(400, "invalid_request", f"token ids are 0 to {session.policy.vocab_size - 1}")
    return np.asarray(ids, dtype=np.int32)


def _record(session: Session, answers: Sequence[Answer]) -> None:
    for answer in answers:
        session.record(answer.prompt_ids, answer.completion, is_cut=answer.finish_reason == "length")


def _heard(completion: Completion, request: Request, tokenizer: Tokenizer) -> tuple[Completion, str, str | None]:
    """The completion up to a stop text, what of it is shown, and which stop text it was.

    Tokens up to the one that completes the stop text are kept, as they were sampled; what came after was never heard.
    """

    def text_of(num_tokens: int) -> str:
        return tokenizer.decode(completion.token_ids[:num_tokens].tolist(), skip_special_tokens=True)

    num_tokens = completion.token_ids.size
    text = text_of(num_tokens)
    stops = [stop for stop in request.stops if stop in text]
    if not stops:
        return completion, text, None
    num_kept = 1 + bisect_left(range(1, num_tokens), True, key=lambda kept: _has(text_of, kept, stops))
    text = text_of(num_kept)
    where, stop_text = min((text.index(stop), stop) for stop in stops if stop in text)
    return _first(completion, num_kept), text[:where], stop_text


def _has(text_of: Callable[[int], str], num_tokens: int, stops: Sequence[str]) -> bool:
    text = text_of(num_tokens)
    return any(stop in text for stop in stops)


def _first(completion: Completion, num_tokens: int) -> Completion:
    return replace(
        completion,
        token_ids=completion.token_ids[:num_tokens],
        logprobs=completion.logprobs[:num_tokens],
        token_versions=completion.token_versions[:num_tokens],
    )


def _parsed(
    heard: Completion,
    text: str,
    parser: ToolParser,
    tools: Sequence[dict[str, object]],
    tokenizer: Tokenizer,
    *,
    stop_text: str | None,
) -> Parsed:
    """The calls in it. The marks around a call may be special tokens; the one that ends a turn is no text."""
    if stop_text is not None:
        return parser.parse(text, tools)
    ids = heard.token_ids[:-1] if heard.terminated else heard.token_ids
    parsed = parser.parse(tokenizer.decode(ids.tolist(), skip_special_tokens=False), tools)
    return parsed if parsed.calls else Parsed(content=text)


def _message(parsed: Parsed) -> Message:
    calls = [
        ToolCall(id=f"call_{uuid.uuid4().hex[:24]}", function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in parsed.calls
    ]
    return Message(role="assistant", content=parsed.content, tool_calls=calls or None)


def _finish_reason(completion: Completion, *, stop_text: str | None) -> str:
    return "stop" if completion.terminated or stop_text is not None else "length"
