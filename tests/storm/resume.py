"""Resume: whatever is killed, and whenever, the final weights are those of a run in which nothing was.

Staleness 0, fixed seeds, float32: then every batch is determined by the tasks alone. Learner, coordinator, rollout
servers or all of them are killed at random points; the weights of the last checkpoint must be the same bit for bit.
"""

import argparse
import asyncio
import hashlib
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.storm.audit import read_records
from tests.storm.faults import LOOK_EVERY_S
from tests.storm.fleet import Fleet

STEPS = 60
TIMEOUT_S = 900.0
ROLES = ("learner", "coordinator", "rollout server", "all")


@dataclass(frozen=True)
class Run:
    """How a run ended."""

    weights: str  # digest
    tasks: list[list[int]]  # trained, by step
    points: list[str]  # what was killed, and at which step


async def run_once(directory: Path, *, rng: random.Random, kills: int, servers: int = 2) -> Run:
    flags = (
        "--groups-per-step", 4, "--group-size", 2, "--max-staleness", 0, "--total-steps", STEPS,
        "--checkpoint-every-steps", 7, "--learning-rate", 0.05, "--server-timeout-s", 2, "--seed", 3,
    )  # fmt: skip
    fleet = Fleet(directory, flags, servers=servers)
    points: list[str] = []
    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
            killing = tasks.create_task(kill_at_random_points(fleet, rng, kills, points))
            await fleet.run()
            killing.cancel()
    finally:
        fleet.kill_all()
    records = read_records(directory)
    name = (directory / "run/checkpoints/CURRENT").read_text().strip()
    weights = (directory / "run/checkpoints" / name / "policy/rank-00000.safetensors").read_bytes()
    trained = [taken[-1]["tasks"] for _, taken in sorted(records.steps.items())]
    return Run(weights=hashlib.sha256(weights).hexdigest(), tasks=trained, points=points)


async def kill_at_random_points(fleet: Fleet, rng: random.Random, kills: int, points: list[str]) -> None:
    """Each at a step of its own, and at a random moment within it."""
    for step in sorted(rng.sample(range(STEPS - 1), kills)):
        while fleet.last_step() < step:
            await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.sleep(rng.uniform(0.0, 0.1))
        role = rng.choice(ROLES)
        pids = [pid for pid, found in sorted(fleet.processes().items()) if role in (found, "all")]
        for pid in pids if role == "all" else pids[: rng.randint(1, 2)]:
            fleet.signal(pid, signal.SIGKILL)
        points.append(f"{role} at {step}")


def first_difference(expected: Run, found: Run) -> str:
    for step, (one, other) in enumerate(zip(expected.tasks, found.tasks, strict=False), start=1):
        if one != other:
            return f"step {step} trained tasks {other} instead of {one}"
    return "the same tasks were trained in every step"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm.resume", description=__doc__)
    parser.add_argument("--points", type=int, default=200, help="kills in all (default: 200)")
    parser.add_argument("--kills", type=int, default=10, help="kills of one run (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the points (default: 0)")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    expected: Run | None = None
    num_points, failed = 0, 0
    while num_points < arguments.points:
        directory = Path(tempfile.mkdtemp(prefix="resume-"))
        started_s = time.monotonic()
        kills = 0 if expected is None else arguments.kills
        found = asyncio.run(run_once(directory, rng=rng, kills=kills))
        expected = expected or found
        num_points += len(found.points)
        same = found.weights == expected.weights
        print(
            f"{time.monotonic() - started_s:5.0f} s  weights {found.weights[:16]} {'same' if same else 'DIFFERENT'}  "
            f"{num_points:4} points  {', '.join(found.points)}",
            flush=True,
        )
        if same:
            shutil.rmtree(directory)
        else:
            failed += 1
            print(f"  {first_difference(expected, found)}; records: {directory}")
    print(f"{num_points} points, {failed} runs with other weights than the uninterrupted one")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
