"""How much memory a process and all that it started take."""

import asyncio
import os
from pathlib import Path

SAMPLE_EVERY_S = 1.0


def tree_bytes(root: int) -> int:
    """Proportional set size: what several share is counted once. A process that ends meanwhile counts nothing."""
    total, pids = 0, [root]
    while pids:
        process = Path("/proc") / str(pids.pop())
        try:
            rollup = (process / "smaps_rollup").read_text()
            for task in (process / "task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:
            continue
        total += next((int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return total


class PeakMemory:
    """The most that this process and its children took at any look."""

    def __init__(self) -> None:
        self.num_bytes = 0

    async def watch(self) -> None:
        """Until it is cancelled."""
        while True:
            self.num_bytes = max(self.num_bytes, await asyncio.to_thread(tree_bytes, os.getpid()))
            await asyncio.sleep(SAMPLE_EVERY_S)
