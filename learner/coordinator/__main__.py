"""`python -m learner.coordinator SETTINGS.json [--parent PID]`: the coordinator process, started by the learner."""

import argparse
import dataclasses
import gc
import sys
from pathlib import Path
from typing import NoReturn

import msgspec

from common.lifecycle import configure_logging, die_with_parent, leave, run_until_stopped
from learner.coordinator.background import in_thread
from learner.coordinator.held_out import open_with_held_out
from learner.coordinator.service_settings import ServiceSettings, read_settings
from learner.coordinator.serving import serve
from learner.coordinator.tasks import Tasks, open_tasks

# Thousands of groups come and go while few cycles are made: looking for those as often as usual costs 6 % of the time.
GC_THRESHOLDS = (20_000, 20, 20)
# The journal's thread asks for the interpreter before and after each statement. As usual it would wait 5 ms whenever
# the event loop is busy, and what is acknowledged would wait with it.
SWITCH_INTERVAL_S = 0.0001


def main() -> NoReturn:
    parser = argparse.ArgumentParser(prog="python -m learner.coordinator", description=__doc__)
    parser.add_argument("settings", type=Path, help="JSON file written by the learner")
    parser.add_argument("--parent", type=int, help="process id of the learner: the coordinator ends with it")
    arguments = parser.parse_args()
    configure_logging("coordinator")
    gc.set_threshold(*GC_THRESHOLDS)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.freeze()  # of what was imported nothing becomes garbage: looking through it takes 6 ms each time
    if arguments.parent is not None:
        die_with_parent(arguments.parent)
    leave(run_until_stopped(lambda: _main(arguments.settings)))


async def _main(path: Path) -> int:
    settings = read_settings(path)
    tasks, held_out = await in_thread(lambda: _open(settings))
    return await serve(_with_source(settings, tasks), tasks, held_out)


def _open(settings: ServiceSettings) -> tuple[Tasks, Tasks | None]:
    """What is trained, and what is evaluated."""
    evaluation, rules = settings.evaluation, settings.rules.evaluation
    if evaluation is None or rules is None:
        return open_tasks(settings.prompts, seed=settings.seed, specs=settings.environments), None
    return open_with_held_out(
        settings.prompts,
        seed=settings.seed,
        num_tasks=rules.num_tasks,
        evaluation_source=evaluation.data,
        specs=settings.environments,
    )


def _with_source(settings: ServiceSettings, tasks: Tasks) -> ServiceSettings:
    """The rules know the data by name, so that a checkpoint of other data is refused."""
    rules = dataclasses.replace(settings.rules, source=tasks.name)
    return msgspec.structs.replace(settings, rules=rules)


if __name__ == "__main__":
    main()
