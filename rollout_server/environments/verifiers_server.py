"""VerifiersServer: one verifiers environment server, and the requests that wait for its answers."""

import asyncio
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Self

from common.codec import Frame
from common.environments import EnvironmentSettings
from common.wire.foreign import ConnectionBroken, ForeignDealer, open_foreign_dealer
from rollout_server.environments.capacity import Capacity
from rollout_server.environments.environment import EnvironmentFailure
from rollout_server.environments.health import Health
from rollout_server.environments.verifiers_episode import cancel_request

PREFIX = "verifiers+tcp://"
ASK_AFTER_S = 5.0  # without a word, while something is waited for
CUT_OFF = 4  # times max_reply_bytes: what is larger is not even received, and ends the connection

NOBODYS = b"nobody-"

_NOTHING = b"\x80"  # an empty map

OnDelta = Callable[[Frame], None]


class Pending:
    """A request that waits for its reply."""

    def __init__(self, on_delta: OnDelta | None) -> None:
        self.reply: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()
        self.on_delta = on_delta

    def fail(self, error: Exception) -> None:
        if not self.reply.done():
            self.reply.set_exception(error)


class VerifiersServer:
    """Behind one connection, made when it is needed. An async context manager.

    When the connection breaks, or the server says nothing for step_timeout_s, all that wait for it are told. An answer
    to nothing that waits is dropped: it may be one that came too late.
    """

    def __init__(self, url: str, settings: EnvironmentSettings) -> None:
        """Raises ValueError unless url is verifiers+tcp://HOST:PORT."""
        host, _, port = url.removeprefix(PREFIX).rpartition(":")
        has_port = port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16
        if not url.startswith(PREFIX) or not has_port or not host or set(host) & set("/@;?#* "):
            raise ValueError(f"{url!r} must look like verifiers+tcp://HOST:PORT")
        self.address = url.removeprefix("verifiers+")
        self.settings = settings
        self.health = Health()
        self.capacity = Capacity(settings.max_concurrent)
        self.dropped = 0  # answers to nothing that waits
        self._pending: dict[bytes, Pending] = {}
        self._dealer: ForeignDealer | None = None
        self._opening = asyncio.Lock()
        self._serving: asyncio.Task[None] | None = None
        self._tasks = asyncio.TaskGroup()
        self._orphans: list[str] = []  # runs that were lost with a connection
        self._heard_at = 0.0

    def __repr__(self) -> str:
        state = f"{len(self._pending)} requests, {self.dropped} answers to nothing"
        return f"<VerifiersServer {self.address}, {state}, {self.capacity!r}, {self.health!r}>"

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._serving is not None:
            self._serving.cancel()
        cancelled = (kind, error, trace) if isinstance(error, asyncio.CancelledError) else (None, None, None)
        await self._tasks.__aexit__(*cancelled)

    async def check(self, *, timeout_s: float) -> None:
        """Returns when the server has answered; raises ConnectionBroken."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect(timeout_s)
                await self._request(b"health", _NOTHING)
        except TimeoutError as error:
            raise ConnectionBroken(f"{self.address} gave no answer within {timeout_s:g} s") from error

    async def run(self, payload: bytes, on_delta: OnDelta) -> Frame:
        """The reply to a run, which is cancelled when nobody waits for it any more.

        Raises ConnectionBroken, and what on_delta raises.
        """
        return await self._request(b"run", payload, on_delta)

    async def _request(self, method: bytes, payload: bytes, on_delta: OnDelta | None = None) -> Frame:
        request_id = uuid.uuid4().hex
        pending = self._pending[request_id.encode()] = Pending(on_delta)
        try:
            self._send(request_id, method, payload)
            return await pending.reply
        except (asyncio.CancelledError, EnvironmentFailure):
            if method == b"run":
                self._abort(request_id)
            raise
        finally:
            del self._pending[request_id.encode()]

    def _send(self, request_id: str, method: bytes, payload: bytes) -> None:
        if self._dealer is None:
            raise ConnectionBroken(f"{self.address}: the connection broke")
        self._dealer.send([request_id.encode(), method, payload])

    def _abort(self, request_id: str) -> None:
        try:
            self._send(_nobodys(), b"cancel", cancel_request(request_id))
        except ConnectionBroken:
            return  # and with it whoever ran

    # --- the connection ----------------------------------------------------------------------------------------------

    async def _connect(self, timeout_s: float) -> None:
        async with self._opening:
            if self._dealer is None:
                opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._serving = self._tasks.create_task(self._serve(opened, timeout_s))
                try:
                    await opened
                except asyncio.CancelledError:
                    self._serving.cancel()
                    raise

    async def _serve(self, opened: "asyncio.Future[None]", timeout_s: float) -> None:
        """Until the connection breaks."""
        most = CUT_OFF * self.settings.max_reply_bytes
        try:
            async with open_foreign_dealer(self.address, max_frame_bytes=most, timeout_s=timeout_s) as dealer:
                self._dealer = dealer
                self._abort_orphans()
                if not opened.done():
                    opened.set_result(None)
                await self._listen(dealer)
        except ConnectionBroken as error:
            self._lose(opened, error)
        except asyncio.CancelledError:
            self._lose(opened, ConnectionBroken(f"{self.address}: the connection was closed"))
            raise

    def _lose(self, opened: "asyncio.Future[None]", error: ConnectionBroken) -> None:
        if not opened.done():
            opened.set_exception(error)
        if self._serving is not asyncio.current_task():
            return  # another connection has taken the place of this one
        self._dealer = None
        for request_id, pending in self._pending.items():
            pending.fail(error)
            if pending.on_delta is not None:
                self._orphans.append(request_id.decode())

    def _abort_orphans(self) -> None:
        """What was lost with the connection before may still run, and must not play on beside another."""
        while self._orphans:
            self._abort(self._orphans.pop())

    async def _listen(self, dealer: ForeignDealer) -> None:
        loop = asyncio.get_running_loop()
        self._heard_at = loop.time()
        while True:
            try:
                async with asyncio.timeout(ASK_AFTER_S):
                    messages = await dealer.receive()
            except TimeoutError:
                self._ask_after(dealer)
                continue
            self._heard_at = loop.time()
            for message in messages:
                self._take(*message)

    def _ask_after(self, dealer: ForeignDealer) -> None:
        """A server that only computes says nothing, but answers this."""
        now = asyncio.get_running_loop().time()
        limit_s = self.settings.step_timeout_s
        if not self._pending:
            self._heard_at = now
        elif now - self._heard_at > limit_s + ASK_AFTER_S:
            raise ConnectionBroken(f"{self.address} said nothing for {limit_s:g} s (step_timeout_s), though asked")
        else:
            dealer.send([_nobodys().encode(), b"health", _NOTHING])

    def _take(self, request_id: Frame, kind: Frame, payload: Frame) -> None:
        pending = self._pending.get(bytes(request_id))
        if pending is None or pending.reply.done():
            self.dropped += not bytes(request_id).startswith(NOBODYS)
        elif len(payload) > self.settings.max_reply_bytes:
            most = self.settings.max_reply_bytes
            reason = f"{self.address} sent {len(payload)} bytes, at most {most} are allowed: max_reply_bytes"
            pending.fail(EnvironmentFailure("environment_error", reason))
        elif bytes(kind) == b"reply":
            pending.reply.set_result(payload)
        elif bytes(kind) == b"delta" and pending.on_delta is not None:
            try:
                pending.on_delta(payload)
            except EnvironmentFailure as failure:
                pending.fail(failure)
        else:
            pending.fail(EnvironmentFailure("environment_error", f"{self.address} sent what is no answer"))


def _nobodys() -> str:
    """The id of a request whose reply nobody waits for. A pool tells requests apart by their ids alone."""
    return NOBODYS.decode() + uuid.uuid4().hex
