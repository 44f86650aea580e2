"""`make quickstart`: train the demo with everything real on this machine, then say and draw what happened."""

import argparse
import sys
import time
from pathlib import Path

from common.events import EventLog
from common.lifecycle import UserError, configure_logging, run_until_stopped
from deploy.report import write_report
from deploy.up import RunPlan, up
from learner.__main__ import parse_learner
from learner.demo.model import build_demo_model

CONFIG = Path(__file__).with_name("quickstart.toml")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.quickstart", description=__doc__)
    parser.add_argument(
        "--run-dir", type=Path, default=None, help="where the run goes (default: a new folder under runs/)"
    )
    arguments, learner_flags = parser.parse_known_args(argv)
    configure_logging("quickstart")
    run_dir = arguments.run_dir or Path("runs") / time.strftime("quickstart-%Y%m%d-%H%M%S")
    try:
        return quickstart(run_dir.absolute(), learner_flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def quickstart(run_dir: Path, learner_flags: list[str]) -> int:
    from deploy.quickstart.evaluation import NUM_PROMPTS, accuracy  # imports torch: seconds

    print(f"Quickstart: a small model learns a task by reinforcement learning.\n  run directory: {run_dir}")
    start_model = run_dir / "demo-model"
    if not start_model.exists():
        build_demo_model(start_model)
    before = accuracy(start_model)
    print(f"  before: {before:.1%} of {NUM_PROMPTS} prompts held out of training are answered right")
    print("  starting learner, coordinator, snapshot server and rollout server (vLLM takes some seconds)\n")
    flags = ("--run-dir", str(run_dir), "--model", str(start_model), *learner_flags)
    learner = parse_learner(["--config", str(CONFIG), *flags])
    plan = RunPlan(config=CONFIG, learner=learner, learner_flags=flags, num_rollout_servers=1)
    code = run_until_stopped(lambda: up(plan))
    if code != 0:
        return code
    policy = run_dir / "huggingface" / f"step-{learner.total_steps:06d}"
    events = EventLog(run_dir / "events-evaluation.jsonl", "evaluation")
    events.emit("eval", version=0, accuracy=before, prompts=NUM_PROMPTS)
    events.emit("eval", version=learner.total_steps, accuracy=accuracy(policy), prompts=NUM_PROMPTS)
    events.close()
    return write_report(run_dir)


if __name__ == "__main__":
    sys.exit(main())
