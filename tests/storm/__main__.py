"""A storm: real processes, sockets and journal; SIGKILL, SIGSTOP and SIGTERM at random; and an audit of the records.

The learner and the rollout servers run with a table policy in place of DeepSpeed and vLLM, so that a step takes
milliseconds; everything else is what users run. With --real these two are real as well. Whatever dies is started again.
Storms of odd seeds sample dynamically: groups of equal rewards are filtered.
"""

import argparse
import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.storm.audit import Verdict, audit, read_records
from tests.storm.faults import LONGEST_END_S, Faults
from tests.storm.fleet import REAL, TABLE, Fleet, Stack

GROUPS_PER_STEP, GROUP_SIZE, MAX_STALENESS, MAX_FILTERED = 4, 2, 2, 4
FILTERING = (
    "--dynamic-sampling", MAX_FILTERED, "--evaluation-data", "python:tests.storm.task:evaluation_prompts",
)  # fmt: skip
TIMEOUT_S = 1800.0


async def storm(
    directory: Path, *, seed: int, steps: int, kills: int, servers: int, stack: Stack = TABLE
) -> tuple[Verdict, Faults]:
    flags = (
        "--groups-per-step", GROUPS_PER_STEP, "--group-size", GROUP_SIZE, "--max-staleness", MAX_STALENESS,
        "--total-steps", steps, "--checkpoint-every-steps", 25, "--learning-rate", stack.learning_rate,
        "--server-timeout-s", 3, "--seed", seed, "--evaluate-every-steps", 20, "--evaluation-tasks", 8,
        "--evaluation-samples", 2, "--evaluation-timeout-s", 60, *(FILTERING if filters(seed) else ()),
    )  # fmt: skip
    reward = "noted_reward" if filters(seed) else "reward"
    fleet = Fleet(directory, flags, servers=servers, reward=reward, stack=stack)
    faults = Faults(fleet, random.Random(seed), kills, steps)
    try:
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
            striking = tasks.create_task(faults.run())
            await fleet.run()
            striking.cancel()
        left = await fleet.ends_everywhere()
    finally:
        fleet.kill_all()
    verdict = audit(
        read_records(directory),
        total_steps=steps,
        groups_per_step=GROUPS_PER_STEP,
        max_staleness=MAX_STALENESS,
        max_filtered=MAX_FILTERED if filters(seed) else 0,
    )
    verdict.check(not left, f"processes were left behind: {left}")
    verdict.check(
        not faults.overdue, f"still there {LONGEST_END_S} s after SIGTERM, or their children: {faults.overdue}"
    )
    return verdict, faults


def filters(seed: int) -> bool:
    """Whether the storm of the seed samples dynamically."""
    return seed % 2 == 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1, help="storms, one after the other (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--kills", type=int, default=100, help="faults of each storm (default: 100)")
    parser.add_argument("--trajectories", type=int, default=10_000, help="to be trained in each (default: 10,000)")
    parser.add_argument("--servers", type=int, default=3, help="rollout servers (default: 3)")
    parser.add_argument("--real", action="store_true", help="vLLM and DeepSpeed in place of the table policy")
    parser.add_argument("--keep", action="store_true", help="keep the directory of a storm that went well, too")
    arguments = parser.parse_args()
    steps = max(1, arguments.trajectories // (GROUPS_PER_STEP * GROUP_SIZE))
    print("seed  seconds  steps  repeated  learners  acknowledged  filtered  faults  complaints")
    failed = 0
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        directory = Path(tempfile.mkdtemp(prefix=f"storm-{seed}-"))
        started_s = time.monotonic()
        verdict, faults = asyncio.run(
            storm(
                directory,
                seed=seed,
                steps=steps,
                kills=arguments.kills,
                servers=arguments.servers,
                stack=REAL if arguments.real else TABLE,
            )
        )
        print(
            f"{seed:4}  {time.monotonic() - started_s:7.0f}  {verdict.num_steps:5}  {verdict.num_repeated:8}  "
            f"{verdict.num_lineages:8}  {verdict.num_acknowledged:12}  {verdict.num_filtered:8}  "
            f"{faults.hits.total():6}  {len(verdict.complaints):10}  {dict(sorted(faults.hits.items()))}",
            flush=True,
        )
        for complaint in verdict.complaints:
            print(f"      {complaint}")
        if verdict.complaints or arguments.keep:
            failed += bool(verdict.complaints)
            print(f"      logs and records: {directory}")
        else:
            shutil.rmtree(directory)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
