"""`make learn`: what staleness costs on the demo task, corrected and uncorrected, at equal optimizer steps.

Interrupted, it goes on where it was when it is run again. Flags that it does not know go to the learner.
"""

import argparse
import sys
from pathlib import Path

from tests.learning.campaign import load, planned, run_all
from tests.learning.results import draw, table, write_csv


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.learning", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each setting (default: 5)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    parser.add_argument("--minutes", type=float, default=600, help="begin no further run after so many (default: 600)")
    parser.add_argument("--directory", type=Path, default=Path("runs/learn"), help="of the results")
    parser.add_argument(
        "--plot", type=Path, help="write the picture here, a CSV beside it (default: into the directory)"
    )
    arguments, rest = parser.parse_known_args()
    flags, runs = tuple(rest), planned(arguments.seeds)
    (arguments.directory / "models").mkdir(parents=True, exist_ok=True)
    missing = run_all(
        arguments.directory, runs, flags=flags, processes=arguments.processes, budget_s=60 * arguments.minutes
    )
    results = {run: result for run in runs if (result := load(arguments.directory, run, flags)) is not None}
    print(table(results))
    picture = arguments.plot or arguments.directory / "learning.png"
    draw(results, picture)
    write_csv(results, picture.with_suffix(".csv"))
    if missing:
        print(f"{len(missing)} of {len(runs)} runs are missing: run this again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
