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
SIGNALS = {signal.SIGKILL: 60, signal.SIGSTOP: 25, signal.SIGTERM: 15}
LONGEST_STOP_S = 4.0
LONGEST_END_S = 5.0
LOOK_EVERY_S = 0.05


@dataclass
class Faults:
    """Strikes until so many faults have hit, or the run is done: spread over the steps, at any moment within them."""

    fleet: Fleet
    rng: random.Random
    number: int
    steps: int
    hits: Counter[str] = field(default_factory=Counter)
    overdue: list[str] = field(default_factory=list)  # that had not ended in time after SIGTERM, or left some behind

    async def run(self) -> None:
        while self.hits.total() < self.number and not self.fleet.is_done.is_set():
            await self._pause()
            role = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            if role == "all":
                self.fleet.kill_all()
                self.hits["SIGKILL all"] += 1
                continue
            pids = [pid for pid, found in sorted(self.fleet.processes().items()) if found == role]
            if pids:
                await self._hit(self.rng.choice(pids), role)

    async def _pause(self) -> None:
        """Some steps, or a while of none: then it strikes all the same, while processes start."""
        steps_left, faults_left = self.steps - self.fleet.last_step(), self.number - self.hits.total()
        goal = self.steps - steps_left + self.rng.randint(0, max(0, steps_left) // faults_left)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.fleet.stack.patience_s):
                while self.fleet.last_step() < goal:
                    await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.sleep(self.rng.uniform(0.0, 0.2))

    async def _hit(self, pid: int, role: str) -> None:
        which = self.rng.choices(list(SIGNALS), list(SIGNALS.values()))[0]
        self.hits[f"{which.name} {role}"] += 1
        if which is signal.SIGSTOP:
            self.fleet.signal(pid, which)
            await asyncio.sleep(self.rng.uniform(0.1, LONGEST_STOP_S))
            self.fleet.signal(pid, signal.SIGCONT)
        elif which is signal.SIGTERM:
            family = self.fleet.family(pid)
            self.fleet.signal(pid, which)
            if not await self.fleet.has_ended(family, LONGEST_END_S):
                self.overdue.append(role)
        else:
            self.fleet.signal(pid, which)
