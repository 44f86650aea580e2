"""Routes: what agents may ask of the gateway, each under the key of a session, as a header or in the path."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from rollout_server.environments.environment import EnvironmentFailure
from rollout_server.gateway.answers import answer_chat, answer_completion
from rollout_server.gateway.api_error import ApiError
from rollout_server.gateway.api_replies import chat_events, chat_reply, completion_events, completion_reply
from rollout_server.gateway.api_requests import StartRequest, read_chat, read_completion, read_object, read_start
from rollout_server.gateway.messages_api import message_events, message_reply, read_messages
from rollout_server.gateway.responses_api import response_events, response_reply

if TYPE_CHECKING:
    from rollout_server.gateway.gateway import Gateway
    from rollout_server.gateway.session import Session

MAX_BODY_BYTES = 4 << 20
BODY_TIMEOUT_S = 30.0  # until all of a request is here
PREFIXES = ("", "/session/{key}")

SessionHandler = Callable[["Session", bytes], Awaitable[Response]]


def application(gateway: "Gateway") -> Starlette:
    """The ASGI application of a gateway."""
    posts: dict[str, SessionHandler] = {
        "/v1/chat/completions": _Chat(gateway),
        "/v1/completions": _Completion(gateway),
        "/v1/responses": _Responses(gateway),
        "/v1/messages": _Messages(gateway),
        "/v1/messages/count_tokens": _count_tokens,
        **{f"{version}/rl/set_reward": _set_reward for version in ("", "/v1")},
        **{f"{version}/rl/end_session": _end_session for version in ("", "/v1")},
    }
    routes: list[BaseRoute] = []
    for prefix in PREFIXES:
        routes += [
            Route(prefix + path, _Post(gateway, handler).handle, methods=["POST"]) for path, handler in posts.items()
        ]
        routes.append(Route(f"{prefix}/v1/models", _Models(gateway).handle, methods=["GET"]))
    for version in ("", "/v1"):
        routes.append(Route(f"{version}/rl/start_session", _Start(gateway).handle, methods=["POST"]))
    routes.append(Route("/health", _health, methods=["GET"]))
    return Starlette(routes=routes)


# --- what a session answers ------------------------------------------------------------------------------------------


class _Chat:
    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def __call__(self, session: "Session", body: bytes) -> Response:
        request = read_chat(body)
        answers = await answer_chat(session, self._gateway.tools, request)
        reply = chat_reply(request, answers, model=session.model, tokenizer=session.policy.tokenizer)
        return _events(chat_events(request, reply)) if request.stream else JSONResponse(reply)


class _Completion:
    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def __call__(self, session: "Session", body: bytes) -> Response:
        request = read_completion(body)
        answers = await answer_completion(session, request)
        reply = completion_reply(request, answers, model=session.model, tokenizer=session.policy.tokenizer)
        return _events(completion_events(request, reply)) if request.stream else JSONResponse(reply)


class _Responses:
    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def __call__(self, session: "Session", body: bytes) -> Response:
        request, said = session.responses.read(body)
        [answer] = await answer_chat(session, self._gateway.tools, request)
        reply = response_reply(answer, model=session.model)
        assert answer.message is not None, "an answer in a chat has one"
        session.responses.keep(reply["id"], said, answer.message)
        return _events(response_events(reply)) if request.stream else JSONResponse(reply)


class _Messages:
    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def __call__(self, session: "Session", body: bytes) -> Response:
        request = read_messages(body)
        [answer] = await answer_chat(session, self._gateway.tools, request)
        reply = message_reply(answer, model=session.model)
        return _events(message_events(reply)) if request.stream else JSONResponse(reply)


async def _count_tokens(session: "Session", body: bytes) -> Response:
    request = read_messages(body)
    return JSONResponse({"input_tokens": session.chats.chat_ids(request.messages, request.usable_tools).size})


async def _set_reward(session: "Session", body: bytes) -> Response:
    try:
        session.set_reward(read_object(body).get("reward"))
    except EnvironmentFailure as failure:
        raise ApiError(422, failure.kind, failure.reason) from failure
    return JSONResponse({"reward": session.reward})


async def _end_session(session: "Session", body: bytes) -> Response:
    """With "reward", sets it first."""
    given = read_object(body)
    if "reward" in given:
        await _set_reward(session, body)
    session.end(truncated=given.get("truncated") is True)
    return JSONResponse({"ended": True})


def _events(events: Any) -> Response:
    return StreamingResponse(
        _async(list(events)), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
    )


async def _async(events: list[bytes]) -> Any:
    for event in events:
        yield event


# --- from HTTP and back ----------------------------------------------------------------------------------------------


async def _health(request: Request) -> Response:
    del request
    return JSONResponse({"status": "ok"})


class _Models:
    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def handle(self, request: Request) -> Response:
        try:
            model = self._gateway.session_of(key_of(request)).model
        except ApiError as error:
            return error_reply(error)
        card = {"id": model, "object": "model", "created": 0, "owned_by": "countercurrent"}
        return JSONResponse({"object": "list", "data": [card]})


class _Start:
    """An agent asks for a task; it may wait for one, and is given none once it has hung up."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway

    async def handle(self, request: Request) -> Response:
        try:
            check_agent_key(request, self._gateway.settings.agent_key)
            asked = read_start(await body_of(request))
        except ApiError as error:
            return error_reply(error)
        return await until_hung_up(request, self._answer(asked))

    async def _answer(self, asked: StartRequest) -> Response:
        invitation = await self._gateway.offers.take(asked.queue, timeout_s=asked.wait_s)
        if invitation is None:
            return error_reply(ApiError(429, "no_task", f"there was no task within {asked.wait_s:g} s: ask again"))
        return JSONResponse(invitation)


class _Post:
    """A request with a body, for a session. It is given up when the agent hangs up: nobody would read the answer."""

    def __init__(self, gateway: "Gateway", handler: SessionHandler) -> None:
        self._gateway = gateway
        self._handler = handler

    async def handle(self, request: Request) -> Response:
        try:
            session = self._gateway.session_of(key_of(request))
            body = await body_of(request)
        except ApiError as error:
            return error_reply(error)
        return await until_hung_up(request, self._answer(session, body))

    async def _answer(self, session: "Session", body: bytes) -> Response:
        try:
            return await self._handler(session, body)
        except ApiError as error:
            return error_reply(error)


async def until_hung_up(request: Request, answer: Awaitable[Response]) -> Response:
    """The answer; it is cancelled when the peer closes the connection."""
    try:
        async with asyncio.timeout(None) as until, asyncio.TaskGroup() as tasks:
            watch = tasks.create_task(_hang_up(request, until))
            try:
                return await answer
            finally:
                watch.cancel()
    except TimeoutError:
        return Response(status_code=499)  # for nobody


async def _hang_up(request: Request, until: asyncio.Timeout) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    until.reschedule(asyncio.get_running_loop().time())


def check_agent_key(request: Request, expected: str | None) -> None:
    """Raises ApiError."""
    if expected is not None and not hmac.compare_digest(key_of(request).encode(), expected.encode()):
        raise ApiError(401, "invalid_api_key", "asking for a task takes the key of the file --gateway-key names")


def key_of(request: Request) -> str:
    """Of the path, or as one of the headers that clients send; raises ApiError."""
    if (key := request.path_params.get("key")) is not None:
        return str(key)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    if "x-api-key" in request.headers:
        return request.headers["x-api-key"]
    raise ApiError(401, "invalid_api_key", "send Authorization: Bearer KEY, or call /session/KEY/v1/...")


async def body_of(request: Request) -> bytes:
    """Raises ApiError for one that is too large or too slow."""
    chunks = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                chunks += chunk
                if len(chunks) > MAX_BODY_BYTES:
                    raise ApiError(413, "request_too_large", f"a request has at most {MAX_BODY_BYTES} bytes")
    except TimeoutError as error:
        raise ApiError(408, "request_timeout", f"the request was not all here in {BODY_TIMEOUT_S:g} s") from error
    except ClientDisconnect as error:
        raise ApiError(499, "hung_up", "the request was not all sent") from error
    return bytes(chunks)


def error_reply(error: ApiError) -> Response:
    headers = {"Connection": "close"} if error.status in (408, 413) else {}
    return JSONResponse(error.body, status_code=error.status, headers=headers)
