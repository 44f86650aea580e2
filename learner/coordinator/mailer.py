"""Mailer: sends to many connections, and keeps what one of them does not take at the moment."""

from collections import deque

from common.codec import Frames
from common.wire import Peer, Router, SendResult

MAX_KEPT_MESSAGES = 1 << 10  # beyond what ZeroMQ holds, per connection


class Mailer:
    """Sends, and keeps what a connection does not take at the moment: in order, and bounded."""

    def __init__(self, router: Router) -> None:
        self._router = router
        self._kept: dict[Peer, deque[Frames]] = {}

    def send(self, peer: Peer, frames: Frames) -> bool:
        """False when the connection has taken nothing for so long that its messages are thrown away."""
        kept = self._kept.get(peer)
        if kept is None:
            if self._router.send(peer, frames) is not SendResult.FULL:
                return True  # to a connection that is gone nothing needs to be said: the server is told when it is back
            kept = self._kept[peer] = deque()
        if len(kept) >= MAX_KEPT_MESSAGES:
            del self._kept[peer]
            return False
        kept.append(frames)
        return True

    def is_behind(self, peer: Peer) -> bool:
        return peer in self._kept

    def retry(self) -> None:
        for peer, kept in list(self._kept.items()):
            while kept and self._router.send(peer, kept[0]) is not SendResult.FULL:
                kept.popleft()
            if not kept:
                del self._kept[peer]
