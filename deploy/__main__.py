"""The countercurrent command: everything around the two services."""

import argparse
import sys
from pathlib import Path

from common.key_files import KeyFileError
from common.lifecycle import EXIT_USER_ERROR, UserError, configure_logging, run_until_stopped
from deploy.batch_command import show_batch
from deploy.key_commands import add_key, list_keys, remove_key
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

    batch = commands.add_parser(
        "batch",
        help="show a batch that broke a step",
        description="Show a batch whose loss or gradient was not finite: RUN_DIR/refused/step-N.ccbatch.",
    )
    batch.add_argument("file", type=Path)
    batch.add_argument("--json", action="store_true", help="one object per trajectory, with its tokens")

    _add_key_commands(commands)

    arguments, learner_flags = parser.parse_known_args(argv)
    if learner_flags and arguments.command != "up":
        parser.error(f"unrecognized arguments: {' '.join(learner_flags)}")
    if arguments.command == "report":
        return show_report(arguments.run_dir)
    if arguments.command == "key":
        return _key(arguments)
    if arguments.command == "batch":
        return _batch(arguments)
    learner = parse_learner(["--config", str(arguments.config), *learner_flags])
    configure_logging("up")
    plan = RunPlan(
        config=arguments.config,
        learner=learner,
        learner_flags=tuple(learner_flags),
        num_rollout_servers=arguments.rollout_servers,
    )
    return run_until_stopped(lambda: up(plan))


def _add_key_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    description = (
        "Who may connect to a run. Takes effect at once, also while the learner runs: a new key is let in, the "
        "connections of a revoked one end within two seconds. The same without this command: "
        "keys/allowed/NAME.pub is put there or deleted."
    )
    key = commands.add_parser("key", help="let rollout servers in, or throw them out", description=description)
    actions = key.add_subparsers(dest="action", required=True, metavar="ACTION")
    for action, words in (
        ("add", "make a key file for one more rollout server"),
        ("revoke", "take a key off the allow-list and delete its file"),
        ("list", "names of the keys that are let in"),
    ):
        parser = actions.add_parser(action, help=words, description=words)
        parser.add_argument("run_dir", type=Path, help="the learner's --run-dir")
        if action != "list":
            parser.add_argument("name", help="of the key; letters, digits, '.', '_' and '-'")


def _key(arguments: argparse.Namespace) -> int:
    configure_logging("key")
    try:
        if arguments.action == "list":
            list_keys(arguments.run_dir)
        else:
            {"add": add_key, "revoke": remove_key}[arguments.action](arguments.run_dir, arguments.name)
    except KeyFileError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _batch(arguments: argparse.Namespace) -> int:
    try:
        show_batch(arguments.file, as_json=arguments.json)
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
