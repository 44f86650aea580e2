"""The countercurrent command: everything around the two services."""

import argparse
import sys
from pathlib import Path

from common.lifecycle import configure_logging, run_until_stopped
from deploy.report import show_report
from deploy.up import RunPlan, up
from learner.__main__ import parse_learner


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="countercurrent", description="Asynchronous reinforcement learning for language models."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    start = commands.add_parser(
        "up",
        help="run learner and rollout servers of one config file on this machine",
        description="Run learner and rollout servers of one config file on this machine, until the learner ends. "
        "Flags after the file go to the learner: countercurrent up run.toml --max-staleness 4",
    )
    start.add_argument("config", type=Path, help="TOML file with the tables [learner] and [rollout_server]")
    start.add_argument("--rollout-servers", type=int, default=1, metavar="N", help="how many to start (default: 1)")

    report = commands.add_parser("report", help="summarise a run: text and picture", description="Summarise a run.")
    report.add_argument("run_dir", type=Path, help="the learner's --run-dir")

    arguments, learner_flags = parser.parse_known_args(argv)
    if arguments.command == "report":
        if learner_flags:
            parser.error(f"unrecognized arguments: {' '.join(learner_flags)}")
        return show_report(arguments.run_dir)
    learner = parse_learner(["--config", str(arguments.config), *learner_flags])
    configure_logging("up")
    plan = RunPlan(
        config=arguments.config,
        learner=learner,
        learner_flags=tuple(learner_flags),
        num_rollout_servers=arguments.rollout_servers,
    )
    return run_until_stopped(lambda: up(plan))


if __name__ == "__main__":
    sys.exit(main())
