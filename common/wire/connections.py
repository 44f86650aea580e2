"""Connections: a router's TCP connections as the kernel knows them, and the one way to end a single one of them.

ZeroMQ collects all frames of a message before it shows the first, however many come, and cannot be asked to close one
peer's connection. The kernel counts the bytes of each connection, and ends one on request: ZeroMQ then throws the
unfinished message away. So what a peer has sent and we have not received is bounded here, in bytes on the wire. In
memory a frame of no bytes takes 64 instead of 2 on the wire, or 35 if it is encrypted.

Needs Linux 4.12. Sockets that are paths (ipc://) are not watched: who can reach them runs as the same user.
"""

import fcntl
import socket
import struct
import termios
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from common.wire.refusals import Reason, Refusals

BESIDE_MESSAGES_BYTES = 1 << 16  # a handshake
BESIDE_MESSAGES_BYTES_PER_S = 64  # heartbeats, see opening.py
NOTEWORTHY_BYTES = 1 << 20
CURVE_OVERHEAD_BYTES = 33  # that encryption adds to a frame
SHORT_FRAME_BYTES = 255

_NO_COOKIE = 0
_SO_COOKIE = 57  # asm-generic/socket.h: a number the kernel gives to one socket only
_RECEIVED_OFFSET = 128  # of tcpi_bytes_received in struct tcp_info, see linux/tcp.h
_TCP_INFO_BYTES = _RECEIVED_OFFSET + 8


def wire_bytes(frame_bytes: int, *, encrypted: bool) -> int:
    """Bytes that a frame of this size takes on the wire (ZMTP 3.1, RFC 37 and 26)."""
    body = frame_bytes + CURVE_OVERHEAD_BYTES if encrypted else frame_bytes
    return body + 2 if body <= SHORT_FRAME_BYTES else body + 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of the connections of one router; bytes are of messages that are unfinished, or were not received yet."""

    held_bytes: int  # for one connection
    held_bytes_of_all: int
    connections: int
    silent_connections: int  # that have not sent a message yet


@dataclass(slots=True, kw_only=True)
class Connection:
    """One accepted TCP connection."""

    descriptor: int
    cookie: int
    forgiven_bytes: int  # read when it was first seen: whether they were received as messages is not known
    seen_s: float
    is_silent: bool = True  # no message was received from it; it may still be in its handshake
    key: str = ""  # in hexadecimal, once a message was received
    delivered_bytes: int = 0  # received as messages
    held_bytes: int = 0  # at the last look: read by ZeroMQ, and not received as messages
    is_gone: bool = False  # at the last look

    def __str__(self) -> str:
        return f"{f'key {self.key[:8]}' if self.key else 'no key known'}, {self.held_bytes} bytes held"


class Ending(Enum):
    """What a connection was when it ended."""

    HEARD = "a message was received from it"
    UNHEARD = "nothing was received from it"
    CUT = "we cut it"


class Connections:
    """All connections of one router.

    One thread accepts, looks and cuts; another one, which receives the messages, only calls note().
    """

    def __init__(
        self, port: int, refusals: Refusals, limits: Limits, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._port = port
        self._refusals = refusals
        self._limits = limits
        self._now = now
        self._open: dict[int, Connection] = {}  # by descriptor
        self.num_ended = 0  # for whatever reason: a server was stopped, a cable pulled, bytes damaged
        self._silent: dict[int, Connection] = {}  # those that were silent at the last look, or came later

    def __repr__(self) -> str:
        return f"<Connections {len(self._open)} open, {self.held_bytes} bytes held>"

    @property
    def held_bytes(self) -> int:
        """Bytes of messages that are unfinished or were not received, at the last look."""
        return sum(connection.held_bytes for connection in list(self._open.values()))

    def note(self, descriptor: int, key: str, num_bytes: int) -> None:
        """A message that takes `num_bytes` on the wire was received over the connection."""
        connection = self._open.get(descriptor)
        if connection is not None:
            connection.delivered_bytes += num_bytes
        else:
            state = _state_of(descriptor)
            if state is None or state.port != self._port:
                return
            connection = self._add(descriptor, state)
        connection.is_silent, connection.key = False, key

    def accept(self, descriptor: int) -> None:
        """There is a new connection.

        If there are too many now, one is cut: the oldest that never said anything, else the newest of the key that has
        most of them.
        """
        connection, state = self._open.get(descriptor), _state_of(descriptor)
        if state is None:  # gone already: ended() follows
            state = _State(port=self._port, cookie=_NO_COOKIE, read_bytes=0)
        if connection is None or connection.cookie != state.cookie:
            connection = self._add(descriptor, state)
        if connection.is_silent:
            self._silent[descriptor] = connection
        while len(self._silent) > self._limits.silent_connections:
            oldest = self._silent.pop(next(iter(self._silent)))
            if oldest.is_silent:
                self._cut(oldest, Reason.CROWDING)
        if len(self._open) > self._limits.connections:
            self._cut(self._newest_of_the_most_numerous(), Reason.CROWDING)

    def ended(self, descriptor: int) -> Ending:
        """The connection is gone."""
        self.num_ended += 1
        connection = self._open.pop(descriptor, None)
        if connection is None:
            return Ending.CUT
        return Ending.UNHEARD if connection.is_silent else Ending.HEARD

    def look(self, revoked: frozenset[str]) -> None:
        """Find out what each connection holds; cut those that hold too much, or have a key that is revoked."""
        for connection in list(self._open.values()):
            self._measure(connection)
            if connection.held_bytes > self._limits.held_bytes:
                self._cut(connection, Reason.OVERLONG)
            elif connection.key in revoked:
                self._cut(connection, Reason.REVOKED)
        while self.held_bytes > self._limits.held_bytes_of_all and self.cut_heaviest():
            pass
        self._silent = {
            number: connection for number, connection in self._silent.items() if self._is_silent(connection)
        }

    def cut_heaviest(self) -> int:
        """Cut the connection that holds most; returns how much. 0: none holds a noteworthy amount, none was cut."""
        heaviest = max(list(self._open.values()), key=lambda connection: connection.held_bytes, default=None)
        if heaviest is None or heaviest.held_bytes < NOTEWORTHY_BYTES:
            return 0
        self._cut(heaviest, Reason.OVERLONG)
        return heaviest.held_bytes

    def _add(self, descriptor: int, state: "_State") -> Connection:
        connection = Connection(
            descriptor=descriptor, cookie=state.cookie, forgiven_bytes=state.read_bytes, seen_s=self._now()
        )
        self._open[descriptor] = connection
        return connection

    def _measure(self, connection: Connection) -> None:
        delivered_bytes = connection.delivered_bytes  # before the kernel is asked: so it is never more than was read
        state = _state_of(connection.descriptor)
        if state is None or state.cookie != connection.cookie:
            if connection.is_gone:  # still, and ended() was not called in between
                self._forget(connection)
            connection.is_gone, connection.held_bytes = True, 0
            return
        age_s = self._now() - connection.seen_s
        beside_messages = BESIDE_MESSAGES_BYTES + int(BESIDE_MESSAGES_BYTES_PER_S * age_s)
        known_bytes = connection.forgiven_bytes + delivered_bytes + beside_messages
        connection.held_bytes = max(0, state.read_bytes - known_bytes)

    def _is_silent(self, connection: Connection) -> bool:
        return connection.is_silent and self._open.get(connection.descriptor) is connection

    def _newest_of_the_most_numerous(self) -> Connection:
        connections = list(self._open.values())
        [(key, _)] = Counter(connection.key for connection in connections).most_common(1)
        return max(
            (connection for connection in connections if connection.key == key),
            key=lambda connection: connection.seen_s,
        )

    def _forget(self, connection: Connection) -> None:
        if self._open.get(connection.descriptor) is connection:
            del self._open[connection.descriptor]

    def _cut(self, connection: Connection, reason: Reason) -> None:
        self._forget(connection)
        if end_connection(connection.descriptor, connection.cookie):
            self._refusals.note(reason, str(connection))


@dataclass(frozen=True, slots=True)
class _State:
    """A TCP connection as the kernel sees it."""

    port: int  # on our side
    cookie: int
    read_bytes: int  # by ZeroMQ


def _state_of(descriptor: int) -> _State | None:
    """None when there is no TCP connection behind the descriptor any more."""
    try:
        borrowed = _borrow(descriptor)
    except OSError:
        return None
    try:
        [unread_bytes] = struct.unpack("i", fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4)))
        info = borrowed.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        [received_bytes] = struct.unpack_from("Q", info, _RECEIVED_OFFSET)
        return _State(borrowed.getsockname()[1], _cookie_of(borrowed), received_bytes - unread_bytes)
    except OSError:
        return None
    finally:
        borrowed.detach()


def end_connection(descriptor: int, cookie: int) -> bool:
    """Shut it down in both directions: ZeroMQ finds it closed. False when it is gone already."""
    try:
        borrowed = _borrow(descriptor)
    except OSError:
        return False
    try:
        if _cookie_of(borrowed) != cookie:
            return False
        borrowed.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    finally:
        borrowed.detach()
    return True


def _borrow(descriptor: int) -> socket.socket:
    """A view of ZeroMQ's own socket, to be detached and never closed. Raises OSError unless it is a socket."""
    return socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=descriptor)


def _cookie_of(borrowed: socket.socket) -> int:
    [cookie] = struct.unpack("Q", borrowed.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8))
    return int(cookie)
