"""`make real-model`: some steps with a pre-trained model of 135M parameters, in bfloat16, on a task of reasoning-gym.

vLLM samples, DeepSpeed trains, weights travel: all of the loop, on a model that somebody else has trained.
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from common.lifecycle import UserError, configure_logging, run_until_stopped
from deploy.real_model.fetch import SOURCE, environment, fetch
from deploy.real_model.memory import PeakMemory
from deploy.report import duration, write_report
from deploy.up import RunPlan, up
from learner.__main__ import parse_learner

CONFIG = Path(__file__).with_name("real_model.toml")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.real_model", description=__doc__, epilog="Further flags are the learner's."
    )
    parser.add_argument(
        "--run-dir", type=Path, default=None, help="where the run goes (default: a new folder under runs/)"
    )
    arguments, learner_flags = parser.parse_known_args(argv)
    configure_logging("real-model")
    run_dir = arguments.run_dir or Path("runs") / time.strftime("real-model-%Y%m%d-%H%M%S")
    try:
        return real_model(run_dir.absolute(), learner_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def real_model(run_dir: Path, learner_flags: list[str]) -> int:
    print("A pre-trained model takes some steps of reinforcement learning.")
    print(f"  model: {SOURCE}\n  run directory: {run_dir}")
    model = fetch()
    os.environ.update(environment())  # for the processes that are started
    print("  starting learner, coordinator, snapshot server and rollout server (a minute)\n", flush=True)
    flags = ("--run-dir", str(run_dir), "--model", str(model), *learner_flags)
    learner = parse_learner(["--config", str(CONFIG), *flags])
    plan = RunPlan(config=CONFIG, learner=learner, learner_flags=flags, num_rollout_servers=1)
    memory, began_s = PeakMemory(), time.monotonic()
    code = run_until_stopped(lambda: run(plan, memory))
    if code != 0:
        return code
    write_report(run_dir)
    took, most = duration(time.monotonic() - began_s), f"{memory.num_bytes / 1e9:.1f} GB of memory at most"
    print(f"  took {took} from start to end, and {most}, all processes together")
    return 0


async def run(plan: RunPlan, memory: PeakMemory) -> int:
    async with asyncio.TaskGroup() as tasks:
        watch = tasks.create_task(memory.watch())
        code = await up(plan)
        watch.cancel()
    return code


if __name__ == "__main__":
    sys.exit(main())
