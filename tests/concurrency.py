"""What tests of concurrent work have in common."""

import asyncio
from collections.abc import Callable

TIMEOUT_S = 5.0


async def seen_by_others(what: Callable[[], int], *, until: int) -> set[int]:
    """All values that a task beside the work has seen, up to `until`. Raises TimeoutError."""
    seen = {what()}
    async with asyncio.timeout(TIMEOUT_S):
        while max(seen) < until:
            await asyncio.sleep(0)
            seen.add(what())
    return seen
