"""SIGTERM at random instants, while processes start, train and end: each exits within 5 s, and leaves nothing behind.

A learner and two rollout servers with a table policy; whatever ends is started again, so that the next one is hit at
another moment of its life.
"""

import argparse
import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tests.storm.faults import LONGEST_END_S, LOOK_EVERY_S
from tests.storm.fleet import Fleet

ROLES = ("learner", "rollout server", "coordinator", "snapshot server", "environment worker")
LONGEST_PAUSE_S = 2.0
STEPS_BETWEEN = (0, 0, 1, 1, 5)  # 0: while those start that were hit before
PATIENCE_S = 60.0  # for a step
MANY_STEPS = 1_000_000
FLAGS = (
    "--groups-per-step", 4, "--group-size", 2, "--max-staleness", 1, "--total-steps", MANY_STEPS,
    "--checkpoint-every-steps", 25, "--server-timeout-s", 3,
)  # fmt: skip


async def terminate_at_random(
    directory: Path, *, points: int, rng: random.Random, roles: tuple[str, ...] = ROLES
) -> list[str]:
    """What was wrong: who was still there in the end, or too long after it was told to end."""
    fleet = Fleet(directory, FLAGS, servers=2, reward="slow_reward")
    complaints: list[str] = []
    running = asyncio.create_task(fleet.run())
    try:
        for _ in range(points):
            await until_a_random_instant(fleet, rng)
            found = sorted((role, pid) for pid, role in fleet.processes().items() if role in roles)
            if not found:
                complaints.append("nothing was running")
                continue
            complaints += await terminate(fleet, *rng.choice(found))
    finally:
        running.cancel()
        await asyncio.wait({running})
        left = await fleet.ends_everywhere()
        fleet.kill_all()
    return [*complaints, *(f"left behind: {role}" for role in left)]


async def until_a_random_instant(fleet: Fleet, rng: random.Random) -> None:
    goal = fleet.last_step() + rng.choice(STEPS_BETWEEN)
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while fleet.last_step() < goal:
                await asyncio.sleep(LOOK_EVERY_S)
    await asyncio.sleep(rng.uniform(0.0, LONGEST_PAUSE_S))


async def terminate(fleet: Fleet, role: str, pid: int) -> list[str]:
    family, told_s = fleet.family(pid), time.monotonic()
    fleet.signal(pid, signal.SIGTERM)
    has_ended = await fleet.has_ended(family, LONGEST_END_S)
    print(f"{role} at step {fleet.last_step()}: {time.monotonic() - told_s:.2f} s, {len(family)} processes", flush=True)
    return [] if has_ended else [f"{role} had not ended {LONGEST_END_S:.0f} s after SIGTERM"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm.sigterm", description=__doc__)
    parser.add_argument("--points", type=int, default=40, help="how often somebody is told to end (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default: 0)")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="sigterm-"))
    rng = random.Random(arguments.seed)
    complaints = asyncio.run(terminate_at_random(directory, points=arguments.points, rng=rng))
    for complaint in complaints:
        print(complaint)
    print(f"{arguments.points} points, {len(complaints)} complaints{f'; logs: {directory}' if complaints else ''}")
    if not complaints:
        shutil.rmtree(directory)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
