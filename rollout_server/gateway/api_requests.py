"""Requests of OpenAI's API, as far as they are granted here, checked once at the edge."""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from rollout_server.gateway.api_error import ApiError

MAX_SAMPLES = 16
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Samples = Annotated[int, Meta(ge=1, le=MAX_SAMPLES)]
StopTexts = str | Annotated[list[str], Meta(max_length=16)] | None


class FunctionCall(msgspec.Struct, frozen=True):
    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct, frozen=True):
    function: FunctionCall
    id: str = ""


class TextPart(msgspec.Struct, frozen=True):
    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True):
    """One message of a chat; fields that no template reads are left out."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ToolFunction(msgspec.Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct, frozen=True):
    """A function that the policy may call."""

    type: Literal["function"]
    function: ToolFunction

    @property
    def shown(self) -> dict[str, Any]:
        """As templates know it."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        if self.function.parameters is not None:
            function["parameters"] = self.function.parameters
        return {"type": "function", "function": function}


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request have. temperature, top_p, penalties and the like are read by nobody: the policy is
    sampled as the run says, or its tokens could not be learned from."""

    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    n: Samples | None = None
    stop: StopTexts = None
    logit_bias: dict[str, float] | None = None
    return_token_ids: bool | None = None

    @property
    def stops(self) -> list[str]:
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Request, frozen=True, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1 << 14)]
    max_completion_tokens: Count | None = None
    tools: Annotated[list[Tool], Meta(max_length=1024)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def usable_tools(self) -> list[dict[str, Any]]:
        """None of them if the agent wants none."""
        return [] if self.tool_choice == "none" else [tool.shown for tool in self.tools or []]


class CompletionRequest(Request, frozen=True, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[list[int], Meta(min_length=1)] | None = None
    logprobs: int | None = None
    echo: bool | None = None

    @property
    def limit(self) -> int:
        return self.max_tokens or 16  # as OpenAI has it


class StartRequest(msgspec.Struct, frozen=True, kw_only=True):
    """POST /rl/start_session."""

    wait_s: Annotated[float, Meta(ge=0.0, le=60.0)] = 20.0  # for a task, if there is none now
    queue: Annotated[str, Meta(max_length=128)] = ""  # of an environment agent:pull/QUEUE


AnyRequest = TypeVar("AnyRequest", bound=Request)


def read_chat(body: bytes) -> ChatRequest:
    """Raises ApiError for what is no such request, and for one that asks for another distribution than the policy's."""
    return check_policy(_read(body, ChatRequest))


def check_policy(request: ChatRequest) -> ChatRequest:
    """The request; raises ApiError if what it asks for is not the policy's own choice."""
    if request.tool_choice not in (None, "auto", "none"):
        raise _not_the_policy("tool_choice", 'only "auto" and "none" leave the choice to the policy')
    if request.response_format and request.response_format.get("type") != "text":
        raise _not_the_policy("response_format", "say in the prompt how to answer")
    return request


def read_completion(body: bytes) -> CompletionRequest:
    """As read_chat."""
    request = _read(body, CompletionRequest)
    if not request.prompt:
        raise ApiError(400, "invalid_request", "prompt must be one text or one list of token ids")
    if request.echo:
        raise ApiError(400, "invalid_request", "echo is not supported")
    return request


def read_start(body: bytes) -> StartRequest:
    """Raises ApiError."""
    return decode(body or b"{}", StartRequest)


def read_object(body: bytes) -> dict[str, Any]:
    """Any JSON object; an empty body is an empty one. NaN and Infinity are no JSON. Raises ApiError."""
    return decode(body or b"{}", dict[str, Any])


def _read(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    request = decode(body, kind)
    if request.logit_bias:
        raise _not_the_policy("logit_bias", "leave it out")
    return request


Decoded = TypeVar("Decoded")


def decode(body: bytes, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, "invalid_request", f"the request cannot be read: {error}") from error


def _not_the_policy(parameter: str, advice: str) -> ApiError:
    reason = "tokens of a distribution that is not the policy's own cannot be learned from"
    return ApiError(400, "unsupported_parameter", f"{parameter} is not supported: {reason}; {advice}")
