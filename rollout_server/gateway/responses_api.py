"""Answers in the form of OpenAI's Responses API: whole, and as the events of a stream."""

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from rollout_server.gateway.answers import Answer


def response_reply(answer: Answer, *, model: str) -> dict[str, Any]:
    """A response."""
    is_cut = answer.finish_reason == "length"
    prompt, sampled = int(answer.prompt_ids.size), int(answer.completion.token_ids.size)
    return {
        "id": _new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "model": model,
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "error": None,
        "instructions": None,
        "metadata": {},
        "output": _output(answer),
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],  # those of the request
        "top_p": None,
        "usage": {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": sampled,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + sampled,
        },
    }


def _output(answer: Answer) -> list[dict[str, Any]]:
    message = answer.message
    assert message is not None, "an answer in a chat has one"
    items: list[dict[str, Any]] = []
    if message.text or not message.tool_calls:
        part = {"type": "output_text", "text": message.text, "annotations": [], "logprobs": []}
        item = {"type": "message", "id": _new_id("msg"), "role": "assistant", "status": "completed"}
        items.append(item | {"content": [part]})
    items += [
        {
            "type": "function_call",
            "id": _new_id("fc"),
            "call_id": call.id,
            "name": call.function.name,
            "arguments": call.function.arguments,
            "status": "completed",
        }
        for call in message.tool_calls or []
    ]
    return items


def response_events(reply: Mapping[str, Any]) -> Iterator[bytes]:
    """response.created, the items, response.completed."""
    for number, (kind, fields) in enumerate(_events(reply)):
        data = {"type": kind, "sequence_number": number, **fields}
        yield f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def _events(reply: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    begun = {**reply, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for index, item in enumerate(reply["output"]):
        empty: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        added = {**item, **empty, "status": "in_progress"}
        yield "response.output_item.added", {"output_index": index, "item": added}
        yield from _text_events(index, item) if item["type"] == "message" else _call_events(index, item)
        yield "response.output_item.done", {"output_index": index, "item": item}
    end = "response.completed" if reply["status"] == "completed" else "response.incomplete"
    yield end, {"response": dict(reply)}


def _text_events(index: int, item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    [part] = item["content"]
    where = {"item_id": item["id"], "output_index": index, "content_index": 0}
    yield "response.content_part.added", {**where, "part": {**part, "text": ""}}
    yield "response.output_text.delta", {**where, "delta": part["text"], "logprobs": []}
    yield "response.output_text.done", {**where, "text": part["text"], "logprobs": []}
    yield "response.content_part.done", {**where, "part": part}


def _call_events(index: int, item: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    where = {"item_id": item["id"], "output_index": index}
    yield "response.function_call_arguments.delta", {**where, "delta": item["arguments"]}
    yield "response.function_call_arguments.done", {**where, "arguments": item["arguments"], "name": item["name"]}


def _new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
