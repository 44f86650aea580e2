"""Throughput of an environment while another one of the run is down, over its throughput in a run of its own.

Real coordinator, rollout server and sockets, a learner that only counts, and a table engine that takes its time for a
token, as a GPU does: the rate is limited by how many leases run, which is what the tasks of a server that is down could
take from the others. Without that pause the rate is that of the plumbing on one core, and the same run differs from
itself by a third. Runs of both kinds take turns, as pairs.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from common.environments import Environments
from deploy.up import a_free_port
from tests.system.environment_run import a_run

SUMS = {"url": "python:tests.rollout_server.reward_functions:num_characters"}
WARM_UP_STEPS = 10
STEP_S = 0.01
GATE = 0.95  # with the rule that pauses the environment taken out: 0.92 to 0.93
KINDS = ("openenv+ws", "nemo-gym+http", "reward+http")


def environments(down: str | None) -> Environments:
    """The sums alone, or beside an environment of which there is no server."""
    tables = {"sums": SUMS}
    if down is not None:
        tables["down"] = {"url": f"{down}://127.0.0.1:{a_free_port()}"}
    return Environments.from_toml(tables)


async def groups_per_s(down: str | None, directory: Path, seconds: float) -> float:
    async with a_run(environments(down), directory, step_s=STEP_S) as run:
        for _ in range(WARM_UP_STEPS):
            await run.step()
        run.trained.clear()
        began_s = time.monotonic()
        while time.monotonic() < began_s + seconds:
            await run.step()
        return run.trained[0] / (time.monotonic() - began_s)


async def main(seconds: float, rounds: int) -> int:
    """0, or 1 if the gate was missed."""
    directory = Path(tempfile.mkdtemp())
    missed = 0
    for down in KINDS:
        ratios = []
        for number in range(rounds):
            rates = {
                beside: await groups_per_s(
                    beside, directory / f"{down.partition('+')[0]}-{number}-{bool(beside)}", seconds
                )
                for beside in ((None, down) if number % 2 else (down, None))
            }
            ratios.append(rates[down] / rates[None])
        met = median(ratios) >= GATE
        missed |= not met
        print(f"beside {down:14} that is down: {median(ratios):.3f} of the groups per second, median of {rounds} pairs "
              f"({min(ratios):.3f} to {max(ratios):.3f}); {rates[None]:.0f} alone; "
              f"gate >= {GATE}: {'met' if met else 'MISSED'}")  # fmt: skip
    return missed


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=8.0)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    sys.exit(asyncio.run(main(options.seconds, options.rounds)))
