"""Simulate many histories of the coordinator and check what it promises.

Every history is decided by its seed alone: the configuration, the machines, and everything that goes wrong. The rules
are the coordinator's own code; servers, network, disk, learner and clock are simulated. One history takes about ten
milliseconds.
"""

import argparse
import os
import sys
import time

from tests.simulation.campaign import campaign, examine
from tests.simulation.history import describe

EXAMPLES = """examples:
  python -m tests.simulation                          ten thousand histories on all cores
  python -m tests.simulation --seeds 1000000          a night's worth
  python -m tests.simulation --first 4711 --seeds 1 --history
                                                      one history, told event by event
exit code: 0 when every promise was kept, 1 when one was broken; the seed that broke it is said
"""
MAX_SHOWN_FAILURES = 5
REPORT_EVERY_S = 2.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.simulation",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=10_000, help="how many histories (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed; the others follow (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    parser.add_argument("--history", action="store_true", help="tell what happens in each history, event by event")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    if arguments.history:
        return tell(arguments.first, arguments.seeds)
    return search(arguments.first, arguments.seeds, workers=arguments.workers)


def tell(first: int, seeds: int) -> int:
    code = 0
    for seed in range(first, first + seeds):
        history, failure = examine(seed)
        print("\n".join(describe(event) for event in history))
        print(f"\nseed {seed}: {failure.violation if failure else 'every promise was kept'}")
        code |= failure is not None
    return code


def search(first: int, seeds: int, *, workers: int) -> int:
    """Returns the exit code."""
    started_s = said_s = time.monotonic()
    num_failures = 0
    for progress in campaign(first, seeds, workers=workers):
        for failure in progress.failures:
            num_failures += 1
            if num_failures <= MAX_SHOWN_FAILURES:
                print(f"\n{failure}\n", flush=True)
        now_s = time.monotonic()
        if now_s - said_s > REPORT_EVERY_S or progress.num_done == seeds:
            said_s = now_s
            rate = progress.num_done / (now_s - started_s)
            print(
                f"{progress.num_done} of {seeds} histories, {progress.num_events} events, {rate:.0f} histories/s, "
                f"{num_failures} broke a promise",
                flush=True,
            )
    return 1 if num_failures else 0


if __name__ == "__main__":
    sys.exit(main())
