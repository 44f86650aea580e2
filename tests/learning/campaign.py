"""Campaign: the runs of `make learn`, a process each; one that is done is not run again."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.algorithms import default_corrections
from learner.demo.model import build_demo_model
from learner.loss_settings import default_adam_beta1
from tests.learning.run import CONFIG

RUN_TIMEOUT_S = 1800
POLL_S = 0.5

LOSS = "decoupled_ppo"
ARMS = ("corrected", "uncorrected")  # with what is done by default about staleness, and with nothing
STALENESS = (0, 1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Run:
    """One cell of the table: a setting and a seed."""

    arm: str
    max_staleness: int
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, staleness {self.max_staleness}, seed {self.seed}"

    @property
    def file(self) -> str:
        return f"{self.arm}-{self.max_staleness}-seed-{self.seed}.json"


def planned(seeds: int) -> list[Run]:
    """Seed after seed, so that what is there at any time can be compared; at staleness 0 nothing is corrected."""
    return [
        Run(arm, max_staleness, seed)
        for seed in range(seeds)
        for arm in ARMS
        for max_staleness in STALENESS
        if max_staleness > 0 or arm == "corrected"
    ]


def load(directory: Path, run: Run, flags: tuple[str, ...]) -> dict[str, Any] | None:
    """The result of the run; None if it has not been run like this."""
    path = directory / run.file
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text())
    return result if result["flags"] == list(flags_of(run, flags)) else None


def flags_of(run: Run, flags: tuple[str, ...]) -> tuple[str, ...]:
    """Of the learner; the defaults are named, so that a result made with others is known; the user's own come last."""
    corrections, beta1 = ("unweighted",), default_adam_beta1(0)
    if run.arm == "corrected":
        corrections = default_corrections(loss=LOSS, max_staleness=run.max_staleness)
        beta1 = default_adam_beta1(run.max_staleness)
    named = [word for correction in corrections for word in ("--correction", correction)]
    place = ("--max-staleness", str(run.max_staleness), "--seed", str(run.seed))
    return ("--loss", LOSS, *named, "--adam-beta1", str(beta1), *place, *flags)


def run_all(directory: Path, runs: list[Run], *, flags: tuple[str, ...], processes: int, budget_s: float) -> list[Run]:
    """Run what is missing; none is begun after budget_s. Returns those that are then still missing."""
    waiting = [run for run in runs if load(directory, run, flags) is None]
    deadline_s = time.monotonic() + budget_s
    running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    try:
        while running or (waiting and time.monotonic() < deadline_s):
            while waiting and len(running) < processes and time.monotonic() < deadline_s:
                run = waiting.pop(0)
                running[_start(directory, run, flags)] = (run, time.monotonic())
            time.sleep(POLL_S)
            for process in [process for process in running if process.poll() is not None]:
                run, started_s = running.pop(process)
                if process.returncode != 0:
                    raise SystemExit(f"{run} ended with exit code {process.returncode}")
                left = sum(load(directory, each, flags) is None for each in runs)
                print(f"{run}: done in {time.monotonic() - started_s:.0f} s, {left} of {len(runs)} left", flush=True)
            if any(time.monotonic() - started_s > RUN_TIMEOUT_S for _, started_s in running.values()):
                raise SystemExit(f"a run takes longer than {RUN_TIMEOUT_S} s")
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [run for run in runs if load(directory, run, flags) is None]


def _start(directory: Path, run: Run, flags: tuple[str, ...]) -> subprocess.Popen[bytes]:
    model = directory / "models" / f"seed-{run.seed}"
    if not model.exists():
        unfinished = model.with_suffix(".tmp")
        build_demo_model(unfinished, seed=run.seed)
        unfinished.rename(model)
    command = [sys.executable, "-m", "tests.learning.run", "--output", str(directory / run.file), "--model", str(model)]
    assert CONFIG.exists(), "run this in the repository's root"
    return subprocess.Popen([*command, *flags_of(run, flags)])
