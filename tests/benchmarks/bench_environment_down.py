"""Throughput of an environment while another one of the run is down, over its throughput in a run of its own.

Real coordinator, rollout server and sockets, a table engine, and a learner that only counts: nothing but the plumbing
limits the rate, so that all that a server that is down costs is seen. Runs of both kinds take turns, as pairs: the
machine's noise falls on both.
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median

from common.environments import Environments
from deploy.up import a_free_port
from tests.system.environment_run import a_run

SUMS = {"url": "python:tests.rollout_server.reward_functions:num_characters"}
WARM_UP_STEPS = 10
KINDS = ("openenv+ws", "nemo-gym+http", "reward+http")


def environments(down: str | None) -> Environments:
    """The sums alone, or beside an environment of which there is no server."""
    tables = {"sums": SUMS}
    if down is not None:
        tables["down"] = {"url": f"{down}://127.0.0.1:{a_free_port()}"}
    return Environments.from_toml(tables)


async def groups_per_s(down: str | None, directory: Path, seconds: float) -> float:
    async with a_run(environments(down), directory) as run:
        for _ in range(WARM_UP_STEPS):
            await run.step()
        run.trained.clear()
        began_s = time.monotonic()
        while time.monotonic() < began_s + seconds:
            await run.step()
        return run.trained[0] / (time.monotonic() - began_s)


async def main(seconds: float, rounds: int) -> None:
    directory = Path(tempfile.mkdtemp())
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
        print(f"beside {down:14} that is down: {median(ratios):.3f} of the groups per second, median of {rounds} pairs "
              f"({min(ratios):.3f} to {max(ratios):.3f}); {rates[None]:.0f} alone")  # fmt: skip


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=8.0)
    arguments.add_argument("--rounds", type=int, default=5)
    options = arguments.parse_args()
    asyncio.run(main(options.seconds, options.rounds))
