"""Session: one WebSocket to an OpenEnv server, which is one environment instance. The one file that names websockets.

Strictly one request, one reply: replies bear no number, so after a time-out, or a message that nobody asked for, it
cannot be known what a reply answers, and the session is over.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

MAX_QUOTED_CHARS = 300
CLOSE_TIMEOUT_S = 1.0
MESSAGE_TOO_BIG = 1009  # RFC 6455, 7.4.1

SessionFailureKind = Literal["unreachable", "unusable", "timeout", "full", "lost", "bad_reply", "bad_action", "refused"]


class SessionFailure(Exception):
    """The session is over, or never began.

    unreachable: no connection. unusable: what answers there is no such server. timeout: no reply in time. full: no
    instance is free. lost: the connection ended. bad_reply: what came is no answer. bad_action: the action is not one
    of this environment. refused: the environment raised an error.
    """

    def __init__(self, kind: SessionFailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind: SessionFailureKind = kind
        self.reason = reason


_CODES: Mapping[str, SessionFailureKind] = {"CAPACITY_REACHED": "full", "VALIDATION_ERROR": "bad_action"}


class _Connect(connect):
    """Contacts the server that it was given, and no other."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


@asynccontextmanager
async def open_session(url: str, *, timeout_s: float, max_message_bytes: int) -> AsyncIterator["Session"]:
    """url: ws(s)://...; raises SessionFailure when there is no connection within timeout_s."""
    connection = await _connected(url, timeout_s=timeout_s, max_message_bytes=max_message_bytes)
    session = Session(connection, url, max_message_bytes)
    try:
        yield session
    finally:
        # Without the close message some servers keep the instance until they next write to it.
        with suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                if not session.is_broken:
                    await connection.send('{"type": "close"}')
                    await connection.close()
        connection.transport.abort()


async def _connected(url: str, *, timeout_s: float, max_message_bytes: int) -> ClientConnection:
    try:
        return await _Connect(
            url,
            compression=None,
            proxy=None,
            open_timeout=timeout_s,
            close_timeout=CLOSE_TIMEOUT_S,
            ping_interval=None,  # a server may be busy for as long as a step may take
            max_size=max_message_bytes,
            max_queue=2,
        )
    except InvalidStatus as error:
        status = error.response.status_code
        kind: SessionFailureKind = "unreachable" if status >= 500 or status == 429 else "unusable"
        raise SessionFailure(kind, f"{url} said {status}; redirects are not followed") from error
    except TimeoutError as error:
        raise SessionFailure("unreachable", f"{url}: no connection within {timeout_s:g} s") from error
    except OSError as error:
        raise SessionFailure("unreachable", f"{url}: {error}") from error
    except WebSocketException as error:
        raise SessionFailure("unusable", f"{url} does not speak WebSocket: {error}") from error


class Session:
    """Asks and answers in turn."""

    def __init__(self, connection: ClientConnection, url: str, max_message_bytes: int) -> None:
        self._connection = connection
        self._url = url
        self._max_message_bytes = max_message_bytes
        self.is_broken = False
        self._ending: ConnectionClosed | None = None

    def abort(self) -> None:
        """Whoever waits for a reply is told that the connection was lost."""
        self._connection.transport.abort()

    async def _next(self) -> str | bytes | None:
        """The next message; None when the connection has ended, and all that came before was read."""
        try:
            return await self._connection.recv()
        except ConnectionClosed as error:
            self._ending = error
            return None

    async def request(self, kind: str, data: Mapping[str, Any], *, answer: str, timeout_s: float) -> dict[str, Any]:
        """The data of the reply, whose type must be `answer`; raises SessionFailure, after which nothing can follow."""
        try:
            return await self._request({"type": kind, "data": data}, answer, timeout_s)
        except SessionFailure as failure:
            if failure.kind != "bad_action":
                self._break()
            raise
        except asyncio.CancelledError:
            self._break()
            raise

    def _break(self) -> None:
        """The server must not go on with what nobody waits for any more."""
        self.is_broken = True
        self.abort()

    async def _request(self, message: Mapping[str, Any], answer: str, timeout_s: float) -> dict[str, Any]:
        try:
            async with asyncio.timeout(timeout_s):
                await self._refuse_unasked()
                with suppress(ConnectionClosed):  # what the server said before it closed can still be read
                    await self._connection.send(json.dumps(message))
                reply = await self._next()
        except TimeoutError as error:
            raise SessionFailure("timeout", f"{self._url} gave no reply within {timeout_s:g} s") from error
        return self._data(reply, answer)

    async def _refuse_unasked(self) -> None:
        """Raises SessionFailure if the server has said something since its last answer."""
        try:
            async with asyncio.timeout(0):
                reply = await self._next()
        except TimeoutError:
            return
        try:
            self._data(reply, "error")  # a full server says so unasked, and so does one that ends
        except SessionFailure as failure:
            if failure.kind != "bad_reply":
                raise
        raise SessionFailure("bad_reply", f"{self._url} said something unasked: {_quoted(reply)}")

    def _data(self, reply: str | bytes | None, answer: str) -> dict[str, Any]:
        if reply is None:
            raise self._ended()
        try:
            message = json.loads(reply)
        except (ValueError, RecursionError) as error:
            raise SessionFailure("bad_reply", f"{self._url} sent what is not JSON: {error}") from error
        data = message.get("data") if isinstance(message, dict) else None
        if not isinstance(data, dict):
            raise SessionFailure("bad_reply", f"{self._url} sent what is no message: {_quoted(message)}")
        if message.get("type") == "error":
            code = data.get("code")
            kind = _CODES.get(code, "refused") if isinstance(code, str) else "refused"
            details = _quoted(data.get("errors") or data.get("message"))
            raise SessionFailure(kind, f"{self._url}: {_quoted(code)}: {details}")
        if message.get("type") != answer:
            kind_got = _quoted(message.get("type"))
            raise SessionFailure("bad_reply", f"{self._url} answered with {kind_got}, expected {answer}")
        return data

    def _ended(self) -> SessionFailure:
        ours = self._ending.sent if self._ending is not None else None
        if ours is not None and ours.code == MESSAGE_TOO_BIG:
            limit = f"max_reply_bytes, {self._max_message_bytes}"
            return SessionFailure("bad_reply", f"{self._url} sent a message longer than {limit}")
        return SessionFailure("lost", f"{self._url} closed the connection: {self._ending}")


def _quoted(value: object) -> str:
    return (value if isinstance(value, str) else repr(value))[:MAX_QUOTED_CHARS]
