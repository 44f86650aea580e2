"""Requests of OpenAI's Responses API as chats, and the responses that later ones go on from."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

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


class Part(msgspec.Struct, frozen=True):
    type: Literal["input_text", "output_text", "text"]
    text: str


class Item(msgspec.Struct, frozen=True):
    """One item of the input. Thoughts that an agent sends back are not read."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] = "user"
    content: str | list[Part] | None = None
    call_id: str = ""
    name: str = ""
    arguments: str = "{}"
    output: str | list[Part] = ""


class GivenTool(ToolFunction, frozen=True, kw_only=True):
    type: Literal["function"]


class ResponsesRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[Item], Meta(min_length=1, max_length=1 << 14)]
    model: str = ""
    instructions: str | None = None
    max_output_tokens: Count | None = None
    tools: Annotated[list[GivenTool], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None
    stream: bool | None = None


class ResponseStore:
    """The responses of one session, for requests that name the one before them."""

    def __init__(self) -> None:
        self._chats: dict[str, list[Message]] = {}  # without instructions: those are each request's own

    def read(self, body: bytes) -> tuple[ChatRequest, list[Message]]:
        """The chat that is asked for, and what of it is remembered; raises ApiError."""
        given = decode(body, ResponsesRequest)
        said: list[Message] = []
        if given.previous_response_id is not None:
            if given.previous_response_id not in self._chats:
                raise ApiError(404, "not_found", f"this session has no response {given.previous_response_id[:80]!r}")
            said = list(self._chats[given.previous_response_id])
        said += _messages([Item(content=given.input)] if isinstance(given.input, str) else given.input)
        before = [Message(role="system", content=given.instructions)] if given.instructions else []
        tools = [
            Tool(
                type="function",
                function=ToolFunction(name=tool.name, description=tool.description, parameters=tool.parameters),
            )
            for tool in given.tools or []
        ]
        request = ChatRequest(
            messages=[*before, *said],
            model=given.model,
            max_completion_tokens=given.max_output_tokens,
            tools=tools or None,
            tool_choice=given.tool_choice,
            response_format=(given.text or {}).get("format"),
            stream=given.stream,
        )
        return check_policy(request), said

    def keep(self, response_id: str, said: Sequence[Message], answer: Message) -> None:
        self._chats[response_id] = [*said, answer]


def _messages(items: Sequence[Item]) -> list[Message]:
    """What the policy says and calls in one turn is one message."""
    messages: list[Message] = []
    for item in items:
        if item.type == "function_call_output":
            messages.append(Message(role="tool", content=_text(item.output), tool_call_id=item.call_id))
        elif item.type == "message":
            messages.append(Message(role=item.role, content=_text(item.content)))
        elif item.type == "function_call":
            call = ToolCall(id=item.call_id, function=FunctionCall(name=item.name, arguments=item.arguments))
            last = messages.pop() if messages and messages[-1].role == "assistant" else Message(role="assistant")
            messages.append(msgspec.structs.replace(last, tool_calls=[*(last.tool_calls or []), call]))
    return messages


def _text(content: str | list[Part] | None) -> str:
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""
