"""Mailer: sends to many connections, and keeps what one of them does not take at the moment."""

from collections import deque
from dataclasses import dataclass, field

from common.codec import Frames
from common.wire import Peer, Router, SendResult

MAX_KEPT_BYTES = 8 << 20  # beyond what ZeroMQ holds, per connection
MESSAGE_OVERHEAD_BYTES = 256


@dataclass(slots=True)
class _Kept:
    """Messages that a connection has not taken yet."""

    messages: deque[Frames] = field(default_factory=deque)
    num_bytes: int = 0


class Mailer:
    """Sends, and keeps what a connection does not take at the moment: in order, and bounded."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._kept: dict[Peer, _Kept] = {}

    def send(self, peer: Peer, frames: Frames) -> bool:
        """False when the connection has left so much unread that its messages are thrown away."""
        kept = self._kept.get(peer)
        if kept is None:
            if self._router.send(peer, frames) is not SendResult.FULL:
                return True  # to a connection that is gone nothing needs to be said: the server is told when it is back
            kept = self._kept[peer] = _Kept()
        kept.messages.append(frames)
        kept.num_bytes += _num_bytes(frames)
        if kept.num_bytes > MAX_KEPT_BYTES:
            del self._kept[peer]
            return False
        return True

    def is_behind(self, peer: Peer) -> bool:
        return peer in self._kept

    def retry(self) -> None:
        for peer, kept in list(self._kept.items()):
            while kept.messages and self._router.send(peer, kept.messages[0]) is not SendResult.FULL:
                kept.num_bytes -= _num_bytes(kept.messages.popleft())
            if not kept.messages:
                del self._kept[peer]


def _num_bytes(frames: Frames) -> int:
    return MESSAGE_OVERHEAD_BYTES + sum(len(frame) for frame in frames)
