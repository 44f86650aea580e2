"""Campaign: many histories, each simulated and checked, on several processes."""

import gc
import multiprocessing
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from tests.simulation.check import Violation
from tests.simulation.checker import check
from tests.simulation.history import History
from tests.simulation.plan import plan_of
from tests.simulation.world import simulate

CHUNK = 50  # histories that a worker simulates between two reports
SHOWN_EVENTS = 40


@dataclass(frozen=True, slots=True)
class Failure:
    """A history that breaks a promise."""

    seed: int
    violation: str
    last_events: str

    def __str__(self) -> str:
        return (
            f"{self.last_events}\n\n{self.violation}\n\n"
            f"These were the last events up to there. See all of it with\n"
            f"    python -m tests.simulation --seeds 1 --first {self.seed} --history"
        )


@dataclass(frozen=True, slots=True)
class Progress:
    """What is done so far."""

    num_done: int
    num_events: int
    failures: tuple[Failure, ...]  # new ones


def examine(seed: int) -> tuple[History, Failure | None]:
    """Simulate one history and check it."""
    history = simulate(plan_of(seed))
    try:
        check(history)
    except Violation as violation:
        shown = history.up_to(violation.place, SHOWN_EVENTS)
        return history, Failure(seed, str(violation), shown)
    return history, None


def campaign(first: int, seeds: int, *, workers: int) -> Iterator[Progress]:
    """Examine seeds first, first + 1, ...; reports after every few of them."""
    chunks = [range(start, min(start + CHUNK, first + seeds)) for start in range(first, first + seeds, CHUNK)]
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext()
    with pool as processes:
        results = processes.imap_unordered(_examine_chunk, chunks) if processes else map(_examine_chunk, chunks)
        num_done = num_events = 0
        for done, events, failures in results:
            num_done += done
            num_events += events
            yield Progress(num_done, num_events, failures)


def _examine_chunk(seeds: range) -> tuple[int, int, tuple[Failure, ...]]:
    """Garbage is collected between histories only: within one it costs a tenth of the time."""
    gc.disable()
    events, failures = 0, []
    for seed in seeds:
        history, failure = examine(seed)
        events += len(history)
        if failure is not None:
            failures.append(failure)
    gc.collect()
    return len(seeds), events, tuple(failures)
