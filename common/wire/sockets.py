"""Router and Dealer: ZeroMQ sockets in an event loop, drained without blocking when their descriptor fires."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import zmq

from common.codec import Frame, Frames
from common.wire import options
from common.wire.connections import wire_bytes
from common.wire.lifeline import Lifeline
from common.wire.refusals import Reason
from common.wire.watch import Watch

DRAIN_LIMIT = 64  # messages per turn, so that one busy socket does not starve the event loop
DRAIN_BYTES = 1 << 20  # likewise, and so that little is held beside what is kept of it
LOOK_ANYWAY_S = 1.0
ZERO_COPY_BYTES = 1 << 16  # below this, copying is cheaper than sharing

# As plain numbers: pyzmq's enumerations take longer to combine than a small frame takes to send.
_NOBLOCK, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN, _POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class SendResult(Enum):
    SENT = "sent"
    FULL = "full"  # the peer takes nothing more at the moment
    GONE = "gone"


class Peer(NamedTuple):
    """The other end of one connection. Its identity is its key; the routing id only says where to send."""

    routing_id: bytes
    key: str  # public key in hexadecimal, proven; empty on a local socket without keys


class Incoming(NamedTuple):
    peer: Peer
    frames: Frames


class EventLoopSocket:
    """A ZeroMQ socket in an event loop.

    The descriptor is edge-triggered: it says once that something changed, in either direction, and any call on the
    socket may swallow that. So the state is looked up after every call, and once a second in any case.
    """

    _frames_per_message: int

    def __init__(self, socket: "zmq.Socket[bytes]", address: str, *, encrypted: bool = False) -> None:
        self._socket = socket
        self._encrypted = encrypted
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._parts: list[zmq.Frame] = []  # of a message that is being received
        self._wire_bytes = 0  # of all its frames, those not kept included
        self.address = address
        self.malformed = 0  # messages dropped for their number of frames

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}, {self.malformed} malformed>"

    def attach(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket.FD, self._look)
        self._look_anyway()

    def detach(self) -> None:
        self._watchdog.cancel()
        asyncio.get_running_loop().remove_reader(self._socket.FD)

    def _look_anyway(self) -> None:
        self._look()
        self._watchdog = asyncio.get_running_loop().call_later(LOOK_ANYWAY_S, self._look_anyway)

    def _look(self) -> None:
        events = self._socket.get(zmq.EVENTS)
        assert isinstance(events, int)
        if events & _POLLIN:
            self._readable.set()
        if events & _POLLOUT:
            self._writable.set()

    async def _wait_for_messages(self) -> list[list[zmq.Frame]]:
        while True:
            await asyncio.sleep(0)  # a socket that always has something must let others have a turn
            self._readable.clear()
            if messages := self._drain():
                return messages
            await self._readable.wait()

    def _drain(self) -> list[list[zmq.Frame]]:
        """What can be received without waiting, up to DRAIN_LIMIT messages' worth of frames and about DRAIN_BYTES.

        Of a message with too many frames only what is needed to recognise it is kept.
        """
        messages: list[list[zmq.Frame]] = []
        num_bytes = 0
        for _ in range(DRAIN_LIMIT * self._frames_per_message):
            try:
                frame = self._socket.recv(_NOBLOCK, copy=False)
            except zmq.Again:
                break
            if len(self._parts) <= self._frames_per_message:
                self._parts.append(frame)
            self._wire_bytes += wire_bytes(len(frame), encrypted=self._encrypted)
            num_bytes += len(frame)
            if frame.more:
                continue
            self._finish_message(messages)
            if num_bytes >= DRAIN_BYTES:
                break
        self._look()
        return messages

    def _finish_message(self, messages: list[list[zmq.Frame]]) -> None:
        """All frames of a message were received."""
        if len(self._parts) == self._frames_per_message:
            messages.append(self._parts)
        else:
            self.malformed += 1
        self._parts, self._wire_bytes = [], 0

    def _send_now(self, frames: Sequence[Frame]) -> SendResult:
        try:
            for frame in frames[:-1]:
                self._socket.send(frame, _MORE, copy=len(frame) < ZERO_COPY_BYTES)
            self._socket.send(frames[-1], _NOBLOCK, copy=len(frames[-1]) < ZERO_COPY_BYTES)
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return SendResult.GONE
            raise
        finally:
            if not self._readable.is_set():
                self._look()
        return SendResult.SENT


def body_of(frames: Sequence[zmq.Frame]) -> Frames:
    return [frame.buffer if len(frame) >= ZERO_COPY_BYTES else frame.bytes for frame in frames]


class Router(EventLoopSocket):
    """Binds, and talks to every peer that connects."""

    _frames_per_message = 3  # routing id, header, payload

    def __init__(self, socket: "zmq.Socket[bytes]", address: str, watch: Watch) -> None:
        super().__init__(socket, address, encrypted=watch.asks_for_keys)
        self._watch = watch

    async def receive(self) -> list[Incoming]:
        """What has arrived: at least one message, at most DRAIN_LIMIT."""
        return [self._incoming(frames) for frames in await self._wait_for_messages()]

    def send(self, peer: Peer, frames: Frames) -> SendResult:
        """Hands the message to ZeroMQ or says why not; never waits, never queues.

        Frames of ZERO_COPY_BYTES or more are not copied: they must not change until the peer has them.
        """
        if self.is_revoked(peer):
            return SendResult.GONE
        return self._send_now([peer.routing_id, *frames])

    def is_revoked(self, peer: Peer) -> bool:
        """Whether the peer's key was taken off the allow-list: its connection ends, nothing of it is received."""
        return peer.key in self._watch.revoked

    def refusals(self) -> dict[str, int]:
        """How often strangers and liars were refused since the router was opened, by reason, for metrics."""
        return self._watch.refusals.counts()

    @property
    def connections_ended(self) -> int:
        """TCP connections that are no more, for whatever reason: a stopped server, a pulled cable, damaged bytes."""
        return self._watch.connections_ended

    def _incoming(self, frames: list[zmq.Frame]) -> Incoming:
        routing_id, *body = frames
        return Incoming(Peer(routing_id.bytes, self._key_of(routing_id)), body_of(body))

    def _key_of(self, routing_id: zmq.Frame) -> str:
        # The doorkeeper set User-Id to the key that the peer has proven to hold.
        key = routing_id.get("User-Id") if self._encrypted else ""
        assert isinstance(key, str)
        return key

    def _finish_message(self, messages: list[list[zmq.Frame]]) -> None:
        routing_id, wire_size = self._parts[0], self._wire_bytes
        if self._is_welcome(routing_id, wire_size):
            super()._finish_message(messages)
        else:
            self._parts, self._wire_bytes = [], 0

    def _is_welcome(self, routing_id: zmq.Frame, num_bytes: int) -> bool:
        """num_bytes: of the message with its routing id, which ZeroMQ added."""
        try:
            descriptor = routing_id.get(zmq.SRCFD)
        except zmq.ZMQError:  # ZeroMQ still talks to peers of its earliest versions, and knows nothing about them
            self._watch.refusals.note(Reason.OLD_PROTOCOL, "before ZMTP 3")
            return False
        key = self._key_of(routing_id)
        own_bytes = wire_bytes(len(routing_id), encrypted=self._encrypted)
        self._watch.note(descriptor, key, num_bytes - own_bytes)
        if key in self._watch.revoked:
            self._watch.refusals.note(Reason.REVOKED_MESSAGE, f"of key {key[:8]}")
            return False
        if len(self._parts) != self._frames_per_message:
            self._watch.refusals.note(Reason.MALFORMED, f"of {f'key {key[:8]}' if key else 'a peer without key'}")
        return True


class Dealer(EventLoopSocket):
    """Connects to one router, and again when the connection breaks, or is not answered: it may be half-open.

    Only over TCP everything is expected to be answered: of a path the kernel knows who is there.
    """

    _frames_per_message = 2  # header, payload

    def __init__(self, socket: "zmq.Socket[bytes]", address: str, lifeline: Lifeline) -> None:
        super().__init__(socket, address)
        self._lifeline = lifeline
        self._received: deque[list[zmq.Frame]] = deque()
        self._expects_answers = address.startswith("tcp://")
        self._unanswered_since_s: float | None = None

    def _look_anyway(self) -> None:
        self._lifeline.look()
        super()._look_anyway()
        since_s, now_s = self._unanswered_since_s, time.monotonic()
        if since_s is not None and now_s - since_s > options.SILENCE_S and not self._readable.is_set():
            self._unanswered_since_s = now_s
            self._lifeline.connect_again()

    def _drain(self) -> list[list[zmq.Frame]]:
        messages = super()._drain()
        if messages:
            self._unanswered_since_s = None
        return messages

    def _send_now(self, frames: Sequence[Frame]) -> SendResult:
        result = super()._send_now(frames)
        if result is SendResult.SENT and self._unanswered_since_s is None and self._expects_answers:
            self._unanswered_since_s = time.monotonic()
        return result

    async def receive(self) -> Frames:
        """The next message."""
        if not self._received:
            self._received.extend(await self._wait_for_messages())
        return body_of(self._received.popleft())

    def try_send(self, frames: Frames) -> bool:
        """False when the router takes nothing more at the moment. Large frames are not copied, as in Router.send."""
        return self._send_now(frames) is SendResult.SENT

    async def send(self, frames: Frames) -> None:
        """Waits until there is room. There is none while the router is away and the queue to it is full."""
        while True:
            self._writable.clear()
            if self.try_send(frames):
                return
            await self._writable.wait()
