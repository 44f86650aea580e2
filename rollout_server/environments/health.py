"""Health: whether a server is worth trying now, and how long to wait before trying again. No clock, no IO."""

import math
import random

FAILURES_TO_OPEN = 3
PAUSE_S = 1.0  # after so many failures in a row, doubled with each further one
MAX_PAUSE_S = 4.0  # trying is cheap; how often tasks try is the coordinator's to say
RETRY_S = 0.25  # longest wait before the second try, doubled for each further one
MAX_RETRY_S = 5.0


class Health:
    """A circuit breaker. Calls go to the server until it has failed FAILURES_TO_OPEN times in a row; then none do for
    a pause, and after it a single one tries: its success lets all through again, its failure begins a longer pause.

    Times are seconds of the caller's clock. Every admitted call must end in one of note_success, note_failure and
    note_nothing.
    """

    def __init__(self) -> None:
        self.failures_in_a_row = 0
        self.last_failure = "it was never reached"
        self.is_proven = False  # the last thing known of it is good
        self._paused_until = 0.0
        self._succeeded_at = -math.inf
        self._is_being_tried = False

    def __repr__(self) -> str:
        state = "well" if self.is_proven else f"{self.failures_in_a_row} failures, the last one: {self.last_failure}"
        return f"<Health {state}>"

    @property
    def is_open(self) -> bool:
        return self.failures_in_a_row >= FAILURES_TO_OPEN

    @property
    def is_being_tried(self) -> bool:
        """A single call finds out whether it is up again: others had better wait for what that finds."""
        return self._is_being_tried

    def pause_s(self, now: float) -> float:
        """Until a call may try the server; 0 when one may now."""
        return max(0.0, self._paused_until - now) if self.is_open else 0.0

    def admit(self, now: float) -> bool:
        """Whether a call may go to the server now; while it is not known to be up again, only one at a time."""
        if not self.is_open:
            return True
        if self._is_being_tried or now < self._paused_until:
            return False
        self._is_being_tried = True
        return True

    def note_success(self, now: float) -> None:
        self._succeeded_at = now
        self.failures_in_a_row = 0
        self.is_proven = True
        self._is_being_tried = False

    def note_failure(self, reason: str, now: float, *, sent_at: float) -> None:
        """A call that was sent at sent_at failed. It says nothing of a server that has answered another one since."""
        if sent_at < self._succeeded_at:
            self._is_being_tried = False
            return
        self.last_failure = reason
        self.is_proven = False
        if self.is_open and not self._is_being_tried:
            return  # admitted before the pause: it says nothing new
        self._is_being_tried = False
        self.failures_in_a_row += 1
        excess = self.failures_in_a_row - FAILURES_TO_OPEN
        if excess >= 0:
            self._paused_until = now + min(MAX_PAUSE_S, PAUSE_S * 2.0 ** min(excess, 10))

    def note_nothing(self) -> None:
        """The call was given up for reasons of ours."""
        self._is_being_tried = False


def retry_delay_s(tries: int, random_source: random.Random) -> float:
    """How long to wait after `tries` >= 1 failed ones: anywhere below a bound that doubles, so that those who failed
    together do not come back together."""
    return random_source.uniform(0.0, min(MAX_RETRY_S, RETRY_S * 2.0 ** min(tries - 1, 20)))
