"""ForeignDealer: one connection to a router that is not ours, for as long as it lasts."""

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

import zmq

from common.codec import Frames
from common.wire import options
from common.wire.opening import open_context
from common.wire.sockets import EventLoopSocket, SendResult, body_of

_MONITOR_ADDRESS = "inproc://monitor"
_EVENTS = zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | zmq.Event.CLOSED
_NO_RECONNECT = -1


class ConnectionBroken(Exception):
    """There is no connection, or there is none any more; the message says to where."""


class ForeignDealer(EventLoopSocket):
    """Is never connected again: a server that was started anew knows nothing of what was asked before, and what hangs
    on an answer must hear of that at once. Nothing is queued for a server that is not there."""

    _frames_per_message = 3  # request, kind, payload

    def __init__(self, socket: "zmq.Socket[bytes]", monitor: "zmq.Socket[bytes]", address: str) -> None:
        super().__init__(socket, address)
        self._monitor = monitor
        self._is_up = asyncio.Event()  # or has failed to get up
        self._was_up = False
        self._is_broken = False

    def attach(self) -> None:
        asyncio.get_running_loop().add_reader(self._monitor.FD, self._hear)
        super().attach()

    def detach(self) -> None:
        super().detach()
        asyncio.get_running_loop().remove_reader(self._monitor.FD)

    async def connected(self) -> None:
        """Returns when the other end has proven to speak ZeroMQ; raises ConnectionBroken."""
        await self._is_up.wait()
        self._check()

    async def receive(self) -> list[Frames]:
        """At least one message; raises ConnectionBroken."""
        while True:
            await asyncio.sleep(0)  # a socket that always has something must let others have a turn
            self._readable.clear()
            if messages := self._drain():
                return [body_of(message) for message in messages]
            self._check()
            await self._readable.wait()

    def send(self, frames: Sequence[bytes]) -> None:
        """Never waits; raises ConnectionBroken, also when the other end has long stopped to read."""
        self._check()
        if self._send_now(frames) is not SendResult.SENT:
            raise ConnectionBroken(f"{self.address} takes nothing more")

    def _check(self) -> None:
        if self._is_broken:
            reason = "the connection broke" if self._was_up else "nobody is there, or nobody who speaks ZeroMQ"
            raise ConnectionBroken(f"{self.address}: {reason}")

    def _look_anyway(self) -> None:
        self._hear()
        super()._look_anyway()

    def _hear(self) -> None:
        with suppress(zmq.Again):
            while True:
                event, _ = struct.unpack("=HI", self._monitor.recv_multipart(zmq.NOBLOCK)[0])
                self._note(event)

    def _note(self, event: int) -> None:
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._was_up = True
        else:
            self._is_broken = True
            self._readable.set()
        self._is_up.set()


@asynccontextmanager
async def open_foreign_dealer(address: str, *, max_frame_bytes: int, timeout_s: float) -> AsyncIterator[ForeignDealer]:
    """Connects to a router at tcp://HOST:PORT, and to nothing else. It has no keys: whoever is there is believed.

    A frame of more than max_frame_bytes ends the connection before it is all here.
    Raises ConnectionBroken when nobody there speaks ZeroMQ within timeout_s.
    """
    with open_context() as context, context.socket(zmq.DEALER) as socket, context.socket(zmq.PAIR) as monitor:
        options.set_options(socket, address, max_frame_bytes, encrypted=False)
        socket.set(zmq.IMMEDIATE, 1)
        socket.set(zmq.RECONNECT_IVL, _NO_RECONNECT)
        socket.set(zmq.IPV6, int("[" in address))
        socket.monitor(_MONITOR_ADDRESS, _EVENTS)
        monitor.connect(_MONITOR_ADDRESS)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            raise ConnectionBroken(f"cannot connect to {address}: {error.strerror}") from error
        dealer = ForeignDealer(socket, monitor, address)
        dealer.attach()
        try:
            await _until_connected(dealer, timeout_s)
            yield dealer
        finally:
            dealer.detach()
            socket.disable_monitor()


async def _until_connected(dealer: ForeignDealer, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await dealer.connected()
    except TimeoutError as error:
        raise ConnectionBroken(f"{dealer.address}: nobody who speaks ZeroMQ within {timeout_s:g} s") from error
