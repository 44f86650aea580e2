"""Faults: which process is hit, how and when, from one seed."""

import asyncio
import random
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

from tests.storm.fleet import Fleet

WEIGHTS = {
    "learner": 15, "coordinator": 30, "snapshot server": 5, "rollout server": 30, "environment worker": 10,
    "engine": 10, "all": 4,
}  # fmt: skip
STOP_SHARE = 0.25  # of the faults are SIGSTOP, and SIGCONT after a while
LONGEST_STOP_S = 4.0
LOOK_EVERY_S = 0.05


@dataclass
class Faults:
    """Strikes until so many faults have hit, or the run is done: spread over the steps, at any moment within them."""

    fleet: Fleet
    rng: random.Random
    number: int
    steps: int
    hits: Counter[str] = field(default_factory=Counter)

    async def run(self) -> None:
        while self.hits.total() < self.number and not self.fleet.is_done.is_set():
            await self._pause()
            role = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            if role == "all":
                self.fleet.kill_all()
                self.hits["killed all"] += 1
                continue
            pids = [pid for pid, found in sorted(self.fleet.processes().items()) if found == role]
            if pids:
                await self._hit(self.rng.choice(pids), role)

    async def _pause(self) -> None:
        """Some steps, or a while of none: then it strikes all the same, while processes start."""
        goal = self.fleet.last_step() + self.rng.randint(0, self.steps // self.number)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.fleet.stack.patience_s):
                while self.fleet.last_step() < goal:
                    await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.sleep(self.rng.uniform(0.0, 0.2))

    async def _hit(self, pid: int, role: str) -> None:
        if self.rng.random() >= STOP_SHARE:
            self.fleet.signal(pid, signal.SIGKILL)
            self.hits[f"killed {role}"] += 1
            return
        self.fleet.signal(pid, signal.SIGSTOP)
        await asyncio.sleep(self.rng.uniform(0.1, LONGEST_STOP_S))
        self.fleet.signal(pid, signal.SIGCONT)
        self.hits[f"stopped {role}"] += 1
