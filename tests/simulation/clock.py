"""Clock: virtual time. Everything that happens later is in one heap, and nothing ever waits."""

import heapq
from collections.abc import Callable
from itertools import count
from typing import Any


class Clock:
    """Runs actions in the order of their times, and those of one time in the order they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0  # virtual seconds
        self._order = count()
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + delay_s, action, *arguments)

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        assert when >= self.now, f"asked for {when} at {self.now}: the past cannot be changed"
        heapq.heappush(self._queue, (when, next(self._order), action, arguments))

    def run(self, *, until: float, stop: Callable[[], bool]) -> bool:
        """Let time pass. True: `stop` said so; False: `until` was reached, or nothing is left to happen."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(queue)
            action(*arguments)
            if stop():
                return True
        return False
