"""Inbox: what servers sent and nobody has heard yet. Groups wait here, so that heartbeats need not wait behind them.

A connection is a queue: whatever is said over it comes behind the groups before, and these behind those of all other
servers. So messages are taken off the connections sooner than they are heard, as far as the bound lets them.
"""

import asyncio
from collections import Counter, deque

import msgspec

from common.codec import Frames
from common.messages import Heartbeat
from common.wire import Incoming, Peer

INBOX_BYTES = 16 << 20
MESSAGE_OVERHEAD_BYTES = 512  # of what holds it, so that small messages count too
MAX_HEARTBEAT_BYTES = 1 << 14

_heartbeats = msgspec.msgpack.Decoder(Heartbeat)


class Inbox:
    """Messages in the order of their arrival. Its bound is exceeded by at most what is received at once."""

    def __init__(self, max_bytes: int = INBOX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._messages: deque[Incoming] = deque()
        self._num_bytes = 0
        self._waiting: Counter[Peer] = Counter()  # messages of each peer,
        self._in_order: Counter[Peer] = Counter()  # and those of them that nothing may overtake
        self._filled = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    def __repr__(self) -> str:
        return f"<Inbox {len(self._messages)} messages, {self._num_bytes} of {self._max_bytes} bytes>"

    def may_be_heard_now(self, incoming: Incoming) -> bool:
        """Whether it need not be put in here: its peer has nothing in here, or it is a heartbeat behind mere groups."""
        if _has_payload(incoming.frames):
            return False
        if not self._waiting[incoming.peer]:
            return True
        return not self._in_order[incoming.peer] and _may_overtake(incoming.frames)

    def put(self, incoming: Incoming) -> None:
        self._messages.append(incoming)
        self._count(incoming, 1)
        self._filled.set()
        if self._num_bytes >= self._max_bytes:
            self._has_room.clear()

    def take(self) -> Incoming | None:
        """The oldest one; None when there is none."""
        if not self._messages:
            self._filled.clear()
            return None
        incoming = self._messages.popleft()
        self._count(incoming, -1)
        if self._num_bytes < self._max_bytes:
            self._has_room.set()
        return incoming

    async def wait_for_messages(self) -> None:
        await self._filled.wait()

    async def wait_for_room(self) -> None:
        await self._has_room.wait()

    def _count(self, incoming: Incoming, sign: int) -> None:
        peer, frames = incoming
        self._num_bytes += sign * (MESSAGE_OVERHEAD_BYTES + sum(map(len, frames)))
        for counter in (self._waiting,) if _has_payload(frames) else (self._waiting, self._in_order):
            counter[peer] += sign
            if not counter[peer]:
                del counter[peer]


def _has_payload(frames: Frames) -> bool:
    """Groups have, and nothing else that servers say."""
    return len(frames) > 1 and len(frames[1]) > 0


def _may_overtake(frames: Frames) -> bool:
    """A heartbeat may, unless it says that what is sampled from now on is nobody's: the groups before it are older."""
    if len(frames[0]) > MAX_HEARTBEAT_BYTES:
        return False
    try:
        return not _heartbeats.decode(frames[0]).out_of_service
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
