"""Replies in OpenAI's form: whole, and as the events of a stream. What is streamed was sampled to its end before."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rollout_server.gateway.answers import Answer
from rollout_server.gateway.api_requests import ChatRequest, CompletionRequest, Message, Request
from rollout_server.tokenizer import Tokenizer

DONE = b"data: [DONE]\n\n"


def chat_reply(request: ChatRequest, answers: Sequence[Answer], *, model: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """A chat.completion."""
    choices = [
        {
            "index": index,
            "message": _message(answer),
            "logprobs": {"content": _logprobs(answer, tokenizer), "refusal": None} if request.logprobs else None,
            "finish_reason": answer.finish_reason,
        }
        | _token_ids(request, answer)
        for index, answer in enumerate(answers)
    ]
    head = _head("chatcmpl", "chat.completion", model)
    return head | {"choices": choices, "usage": _usage(answers)} | _prompt_token_ids(request, answers)


def completion_reply(
    request: CompletionRequest, answers: Sequence[Answer], *, model: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    """A text_completion."""
    choices = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": None if request.logprobs is None else _old_logprobs(answer, tokenizer),
            "finish_reason": answer.finish_reason,
        }
        | _token_ids(request, answer)
        for index, answer in enumerate(answers)
    ]
    head = _head("cmpl", "text_completion", model)
    return head | {"choices": choices, "usage": _usage(answers)} | _prompt_token_ids(request, answers)


def chat_events(request: ChatRequest, reply: Mapping[str, Any]) -> Iterator[bytes]:
    """chat.completion.chunk by chunk, then [DONE]."""
    head = {name: reply[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    for choice in reply["choices"]:
        message = choice["message"]
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        if message["content"]:
            deltas.append({"content": message["content"]})
        deltas += [
            {"tool_calls": [{"index": index} | call]} for index, call in enumerate(message.get("tool_calls", []))
        ]
        for number, delta in enumerate(deltas):
            is_second = number == 1 or len(deltas) == 1
            logprobs = choice["logprobs"] if is_second else None
            yield _event(head, [_chunk(choice["index"], delta=delta, logprobs=logprobs)])
        ids = {name: choice[name] for name in ("token_ids",) if name in choice}
        end = _chunk(choice["index"], delta={}, logprobs=None, finish_reason=choice["finish_reason"]) | ids
        yield _event(head, [end])
    yield from _end(request, head, reply)


def completion_events(request: CompletionRequest, reply: Mapping[str, Any]) -> Iterator[bytes]:
    """text_completion by choice, then [DONE]."""
    head = {name: reply[name] for name in ("id", "created", "model", "object")}
    for choice in reply["choices"]:
        yield _event(head, [choice])
    yield from _end(request, head, reply)


def _end(request: Request, head: Mapping[str, Any], reply: Mapping[str, Any]) -> Iterator[bytes]:
    if request.includes_usage:
        yield _event({**head, "usage": reply["usage"]}, [])
    yield DONE


def _event(head: Mapping[str, Any], choices: list[dict[str, Any]]) -> bytes:
    return b"data: " + json.dumps({**head, "choices": choices}).encode() + b"\n\n"


def _chunk(index: int, *, delta: dict[str, Any], logprobs: Any, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _message(answer: Answer) -> dict[str, Any]:
    message = answer.message
    assert isinstance(message, Message), "an answer in a chat has one"
    if not message.tool_calls:
        return {"role": "assistant", "content": message.text, "refusal": None}
    calls = [
        {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": call.function.arguments},
        }
        for call in message.tool_calls
    ]
    return {"role": "assistant", "content": message.text or None, "refusal": None, "tool_calls": calls}


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    prompt = int(answers[0].prompt_ids.size)
    sampled = sum(int(answer.completion.token_ids.size) for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def _logprobs(answer: Answer, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    tokens = answer.tokens(tokenizer)
    logprobs = answer.completion.logprobs.tolist()
    return [
        {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": []}
        for token, logprob in zip(tokens, logprobs, strict=True)
    ]


def _old_logprobs(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    tokens = answer.tokens(tokenizer)
    offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
    logprobs = answer.completion.logprobs.tolist()
    return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": None, "text_offset": offsets}


def _token_ids(request: Request, answer: Answer) -> dict[str, Any]:
    """As vLLM names them."""
    return {"token_ids": answer.completion.token_ids.tolist()} if request.return_token_ids else {}


def _prompt_token_ids(request: Request, answers: Sequence[Answer]) -> dict[str, Any]:
    return {"prompt_token_ids": answers[0].prompt_ids.tolist()} if request.return_token_ids else {}
