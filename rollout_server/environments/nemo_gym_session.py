"""One session of a NeMo Gym server: one connection, one cookie, and requests that are only sent with it."""

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import EnvironmentFailure, FailureKind
from rollout_server.environments.http_server import HttpFailure, HttpServer
from rollout_server.environments.lifeline import Lifeline
from rollout_server.environments.scopes import Scopes

CLOSE_TIMEOUT_S = 2.0


class Session:
    """An async context manager.

    A server takes a request with no cookie, or one of a session it has forgotten, for the first of a new session: it
    says 200, and its reward means nothing. So a session is over when its cookie is missing, when the server changes it,
    and when the server's process has ended since it began.
    """

    def __init__(self, url: str, lifeline: Lifeline, scopes: Scopes, settings: EnvironmentSettings) -> None:
        self._url = url
        self._server = HttpServer(url, max_reply_bytes=settings.max_reply_bytes)
        self._lifeline = lifeline
        self._deaths = lifeline.deaths
        self._scopes = scopes
        self._timeout_s = settings.step_timeout_s
        self._id: str | None = None

    async def __aenter__(self) -> Self:
        await self._server.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.__aexit__(kind, error, trace)

    async def begin(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to the first request, which makes the session; raises HttpFailure."""
        reply = _object(await self._post(path, body), path)
        if not self._server.cookies:
            raise HttpFailure("unusable", f"{self._url}{path} gave no session cookie; is it a NeMo Gym server?")
        self._id = session_id(self._server.cookies)
        await self._lifeline.held(timeout_s=self._timeout_s)
        return reply

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Raises EnvironmentFailure, after which nothing can follow."""
        try:
            return _object(await self.post(path, body), path)
        except HttpFailure as failure:
            kind: FailureKind = "environment_timeout" if failure.kind == "timeout" else "environment_error"
            raise EnvironmentFailure(kind, failure.reason) from failure

    async def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """Raises HttpFailure, or EnvironmentFailure when the session is lost."""
        self._check()
        assert self._server.cookies, "begin comes first"
        try:
            content = await self._post(path, body)
        except HttpFailure:
            self._check()
            raise
        self._check()
        return content

    async def _post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> bytes:
        async with self._scopes.open():
            return await self._server.post_json(
                json.dumps(body).encode(), timeout_s=timeout_s or self._timeout_s, below=path
            )

    def _check(self) -> None:
        if self._lifeline.deaths != self._deaths:
            raise EnvironmentFailure("environment_error", f"{self._url} ended in the middle of the episode")
        if session_id(self._server.cookies) != self._id:
            raise EnvironmentFailure("environment_error", f"{self._url} forgot the session, and began another")

    async def close(self, path: str, body: Mapping[str, Any]) -> bool:
        """Tell the server that nothing follows; whether it knows of such a thing."""
        try:
            await self._post(path, body, timeout_s=CLOSE_TIMEOUT_S)
        except EnvironmentFailure:  # the environment was closed
            return True
        except HttpFailure as failure:
            return failure.status not in (404, 405)
        return True


def session_id(cookies: Sequence[str]) -> str | None:
    """What Starlette's signed cookie, BASE64.TIME.SIGNATURE, holds under "session_id"; None for other kinds."""
    for value in cookies:
        try:
            session = json.loads(base64.b64decode(value.partition(".")[0], validate=True))
        except (binascii.Error, ValueError, RecursionError):
            continue
        if isinstance(session, dict) and isinstance(session.get("session_id"), str):
            return str(session["session_id"])
    return None


def _object(content: bytes, path: str) -> dict[str, Any]:
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise HttpFailure("bad_reply", f"{path} was answered with what is not JSON: {error}") from error
    if not isinstance(reply, dict):
        raise HttpFailure("bad_reply", f"{path} was answered with {type(reply).__name__}, not an object")
    return reply
