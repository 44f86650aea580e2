"""Anthropic's Messages API as chats: requests become ChatRequests, answers become messages or their events."""

import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from rollout_server.gateway.answers import Answer
from rollout_server.gateway.api_error import ApiError
from rollout_server.gateway.api_requests import (
    ChatRequest,
    Count,
    FunctionCall,
    Message,
    Tool,
    ToolCall,
    ToolFunction,
    check_policy,
    decode,
)


class Block(msgspec.Struct, frozen=True):
    """A part of a message: text, tool_use or tool_result. Thoughts that an agent sends back are not read."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}
    tool_use_id: str = ""
    content: "str | list[Block] | None" = None


class Turn(msgspec.Struct, frozen=True):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class GivenTool(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    input_schema: dict[str, Any]
    description: str | None = None


class MessagesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/messages, and /v1/messages/count_tokens."""

    messages: Annotated[list[Turn], Meta(min_length=1, max_length=1 << 14)]
    model: str = ""
    max_tokens: Count | None = None
    system: str | list[Block] | None = None
    tools: Annotated[list[GivenTool], Meta(max_length=1024)] | None = None
    tool_choice: dict[str, Any] | None = None
    stop_sequences: Annotated[list[str], Meta(max_length=16)] | None = None
    stream: bool | None = None


def read_messages(body: bytes) -> ChatRequest:
    """Raises ApiError."""
    given = decode(body, MessagesRequest)
    choice = (given.tool_choice or {}).get("type", "auto")
    messages = [Message(role="system", content=_text(given.system))] if given.system else []
    for turn in given.messages:
        messages += _messages(turn)
    tools = [
        Tool(
            type="function",
            function=ToolFunction(name=tool.name, description=tool.description, parameters=tool.input_schema),
        )
        for tool in given.tools or []
    ]
    return check_policy(
        ChatRequest(
            messages=messages,
            model=given.model,
            max_tokens=given.max_tokens,
            tools=tools or None,
            tool_choice=str(choice),
            stop=given.stop_sequences,
            stream=given.stream,
        )
    )


def _messages(turn: Turn) -> list[Message]:
    """Results of tools are messages of their own, before what else the user says."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    text = "\n".join(block.text for block in turn.content if block.type == "text")
    if turn.role == "assistant":
        calls = [
            ToolCall(id=block.id, function=FunctionCall(name=block.name, arguments=json.dumps(block.input)))
            for block in turn.content
            if block.type == "tool_use"
        ]
        return [Message(role="assistant", content=text, tool_calls=calls or None)]
    results = [
        Message(role="tool", content=_text(block.content), tool_call_id=block.tool_use_id)
        for block in turn.content
        if block.type == "tool_result"
    ]
    return [*results, Message(role=turn.role, content=text)] if text or not results else results


def _text(content: str | list[Block] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if any(block.type != "text" for block in content):
        raise ApiError(400, "invalid_request", "only texts can be read here")
    return "\n".join(block.text for block in content)


def message_reply(answer: Answer, *, model: str) -> dict[str, Any]:
    """A message."""
    message = answer.message
    assert isinstance(message, Message), "an answer in a chat has one"
    content: list[dict[str, Any]] = []
    if message.text or not message.tool_calls:
        content.append({"type": "text", "text": message.text})
    content += [
        {"type": "tool_use", "id": call.id, "name": call.function.name, "input": _object(call.function.arguments)}
        for call in message.tool_calls or []
    ]
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": _stop_reason(answer),
        "stop_sequence": answer.stop_text,
        "usage": {
            "input_tokens": int(answer.prompt_ids.size),
            "output_tokens": int(answer.completion.token_ids.size),
        },
    }


def _stop_reason(answer: Answer) -> str:
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    return reasons.get(answer.finish_reason) or ("end_turn" if answer.stop_text is None else "stop_sequence")


def _object(arguments: str) -> dict[str, Any]:
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {"arguments": arguments}
    return value if isinstance(value, dict) else {"arguments": value}


def message_events(reply: Mapping[str, Any]) -> Iterator[bytes]:
    """message_start, the blocks, message_stop."""
    start = {**reply, "content": [], "stop_reason": None, "stop_sequence": None}
    start["usage"] = {**reply["usage"], "output_tokens": 0}
    yield _event("message_start", message=start)
    for index, block in enumerate(reply["content"]):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        yield _event("content_block_start", index=index, content_block=empty)
        yield _event("content_block_delta", index=index, delta=delta)
        yield _event("content_block_stop", index=index)
    stop = {"stop_reason": reply["stop_reason"], "stop_sequence": reply["stop_sequence"]}
    yield _event("message_delta", delta=stop, usage={"output_tokens": reply["usage"]["output_tokens"]})
    yield _event("message_stop")


def _event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()
