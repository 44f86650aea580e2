"""HttpServer: requests to one URL, and to nothing else, with bounds on time and size. The one file that names httpx."""

import asyncio
import logging
import ssl
from functools import cache
from types import TracebackType
from typing import Literal, Self

import httpx

MAX_QUOTED_BYTES = 300
logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line to say about every request

HttpFailureKind = Literal["unreachable", "timeout", "unusable", "refused", "bad_reply"]


class HttpFailure(Exception):
    """No usable reply.

    unreachable: no connection, or it broke, or the server says that it cannot now (5xx, 429). timeout: no reply in
    time. unusable: it answers, but not to what we ask for (401, 403, 404, 405, redirects). refused: it does not want
    this request (other 4xx). bad_reply: too large, or compressed without being asked to be.
    """

    def __init__(self, kind: HttpFailureKind, reason: str, *, status: int = 0, said: str = "") -> None:
        super().__init__(reason)
        self.kind: HttpFailureKind = kind
        self.reason = reason
        self.status = status  # of the reply; 0 when there is none
        self.said = said  # the beginning of its body


class HttpServer:
    """An async context manager. Follows no redirect, uses no proxy, and reads no more of a reply than is allowed.

    It keeps the cookies that it is given: whoever needs a session of his own needs an HttpServer of his own.
    """

    def __init__(self, url: str, *, max_reply_bytes: int) -> None:
        """Raises ValueError unless url is http(s)://HOST[:PORT][/PATH][?QUERY]."""
        try:
            self._url = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ValueError(f"{url!r} is not a URL: {error}") from error
        if self._url.scheme not in ("http", "https") or not self._url.host or not 0 < (self._url.port or 80) < 1 << 16:
            raise ValueError(f"{url!r} must look like http://HOST:PORT/PATH")
        if self._url.userinfo or self._url.fragment:
            raise ValueError(f"{self._url.host}: a URL with a user name or a fragment is not supported")
        self.url = url
        self._max_reply_bytes = max_reply_bytes
        self._allowed = f"at most {max_reply_bytes} bytes are allowed: max_reply_bytes"
        # How many requests run at once is decided by those who make them.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=4.0)
        self._client = httpx.AsyncClient(
            trust_env=False, follow_redirects=False, limits=limits, timeout=None, verify=_trusted_authorities()
        )

    def __repr__(self) -> str:
        return f"<HttpServer {self.url}>"

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.__aexit__(kind, error, trace)

    @property
    def address(self) -> tuple[str, int]:
        return self._url.host, self._url.port or (443 if self._url.scheme == "https" else 80)

    @property
    def cookies(self) -> list[str]:
        """The values of those that the server has given."""
        return [cookie.value or "" for cookie in self._client.cookies.jar]

    async def post_json(self, body: bytes, *, timeout_s: float, below: str = "") -> bytes:
        """The body of the 200 reply; raises HttpFailure. timeout_s: for everything, connecting included.

        below: a path under the URL's own.
        """
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        url = self._url.copy_with(path=self._url.path.rstrip("/") + below) if below else self._url
        request = self._client.build_request("POST", url, content=body, headers=headers)
        if self.cookies and "Cookie" not in request.headers:
            raise HttpFailure("bad_reply", f"{url}: the server gave cookies that are not for this address")
        return await self._send(request, timeout_s)

    async def get(self, *, timeout_s: float) -> bytes:
        """As post_json."""
        return await self._send(
            self._client.build_request("GET", self._url, headers={"Accept-Encoding": "identity"}), timeout_s
        )

    async def _send(self, request: httpx.Request, timeout_s: float) -> bytes:
        try:
            async with asyncio.timeout(timeout_s):  # httpx's own time-outs begin anew with every byte that comes
                response = await self._client.send(request, stream=True)
                try:
                    content = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise HttpFailure("timeout", f"{self.url} gave no reply within {timeout_s:g} s") from error
        except httpx.TransportError as error:
            raise HttpFailure("unreachable", f"{self.url}: {_described(error)}") from error
        self._check_status(response, content)
        return content

    async def connect(self, *, timeout_s: float) -> None:
        """Returns when a connection was made; raises HttpFailure. Nothing is sent."""
        try:
            async with asyncio.timeout(timeout_s):
                _, writer = await asyncio.open_connection(*self.address)
            writer.transport.abort()
        except (OSError, TimeoutError) as error:
            raise HttpFailure("unreachable", f"{self.url}: {error or 'no connection in time'}") from error

    async def _read(self, response: httpx.Response) -> bytes:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise HttpFailure("bad_reply", f"{self.url} sent a reply in {encoding[:20]!r}, which was not asked for")
        declared = response.headers.get("Content-Length", "0")  # httpx has made sure that it is a number
        chunks = bytearray()
        if int(declared) > self._max_reply_bytes:
            raise HttpFailure("bad_reply", f"{self.url} announced a reply of {declared} bytes, {self._allowed}")
        async for chunk in response.aiter_raw():
            chunks += chunk
            if len(chunks) > self._max_reply_bytes:
                raise HttpFailure("bad_reply", f"{self.url} sent more than a reply may have, {self._allowed}")
        return bytes(chunks)

    def _check_status(self, response: httpx.Response, content: bytes) -> None:
        status = response.status_code
        if status == 200:
            return
        said = f"{response.url} said {status}"
        if quoted := content[:MAX_QUOTED_BYTES].decode(errors="replace").strip():
            said += f": {quoted}"
        if status >= 500 or status == 429:
            raise HttpFailure("unreachable", said, status=status, said=quoted)
        if 300 <= status < 400:
            target = response.headers.get("Location", "")[:MAX_QUOTED_BYTES]
            reason = f"{said}; it redirects to {target!r}, and redirects are not followed"
            raise HttpFailure("unusable", reason, status=status)
        kind: HttpFailureKind = "unusable" if status in (401, 403, 404, 405) else "refused"
        raise HttpFailure(kind, said, status=status, said=quoted)


@cache
def _trusted_authorities() -> ssl.SSLContext:
    """Reading them takes longer than an episode may wait for."""
    return httpx.create_ssl_context(trust_env=False)


def _described(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
