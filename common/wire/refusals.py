"""Refusals: what a router did not take from strangers and liars, counted by reason, and logged without flooding."""

import logging
import math
import time
from collections import Counter
from enum import Enum

logger = logging.getLogger(__name__)

LOG_S = 10.0


class Reason(Enum):
    """Why something was refused: a word for metrics, and what happened, for people."""

    STRANGER = "stranger", "a connection whose key is not on the allow-list"
    UNHEARD = "unheard", "a connection that ended before it said anything in our protocol"
    OLD_PROTOCOL = "old_protocol", "a message in an outdated protocol"
    MALFORMED = "malformed", "a message of a wrong number of frames"
    REVOKED_MESSAGE = "revoked_message", "a message under a key that was revoked"
    REVOKED = "revoked", "a connection whose key was revoked"
    OVERLONG = "overlong", "a connection that sent more than it may before its message was complete"
    CROWDING = "crowding", "a connection because there were too many"

    def __init__(self, word: str, text: str) -> None:
        self.word = word
        self.text = text


class Refusals:
    """Counts since the router was opened. Each reason is noted by one thread only."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._logged: dict[Reason, tuple[float, int]] = {}  # when, and the count then

    def __repr__(self) -> str:
        return f"<Refusals {dict(self._counts)}>"

    def counts(self) -> dict[str, int]:
        return dict(self._counts)

    def of(self, reason: Reason) -> int:
        return self._counts[reason.word]

    def note(self, reason: Reason, who: str) -> None:
        """who: as much as is known of the peer, without what it says of itself."""
        count = self._counts[reason.word] = self._counts[reason.word] + 1
        logged_s, logged_count = self._logged.get(reason, (-math.inf, 0))
        now_s = time.monotonic()
        if now_s - logged_s >= LOG_S:
            logger.warning("refused %s: %d times, the last time %s", reason.text, count - logged_count, who)
            self._logged[reason] = (now_s, count)
