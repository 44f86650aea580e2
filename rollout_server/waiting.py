"""WaitingAloud: a rollout server that waits says for whom, again and again."""

import logging

logger = logging.getLogger(__name__)


class WaitingAloud:
    """Looked at about once a second; all times are seconds of one clock."""

    def __init__(self, address: str, now_s: float) -> None:
        self._address = address
        self._said_s = now_s  # or when there was nothing to say

    def look(self, now_s: float, *, heard_s: float, is_working: bool, waiting_for: str, every_s: float) -> None:
        """`heard_s`: when the learner was last heard. `waiting_for`: what its last words say keeps leases away."""
        if now_s - max(heard_s, self._said_s) > every_s:
            self._said_s = now_s
            logger.info("waiting for the learner at %s: nothing heard of it", self._address)
        elif is_working:
            self._said_s = max(self._said_s, heard_s)
        elif now_s - self._said_s > every_s:
            self._said_s = now_s
            logger.info("waiting for %s", waiting_for or "leases")
