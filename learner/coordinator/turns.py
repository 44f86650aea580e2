"""Turn: a share of the event loop's time, for work that would otherwise keep everybody else waiting."""

import asyncio
import time

TURN_S = 0.0005


class Turn:
    """Begins when it is made, and again after others had theirs."""

    def __init__(self) -> None:
        self._until = time.monotonic() + TURN_S

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self._until

    async def next(self) -> None:
        """Others have their turn now."""
        await asyncio.sleep(0)
        self._until = time.monotonic() + TURN_S
