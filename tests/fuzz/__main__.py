"""Fuzz every decoder of bytes from outside: python -m tests.fuzz --frames 10000000."""

import argparse
import os
import sys
import time
from collections import Counter

from tests.fuzz.campaign import campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="damaged frames in all (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    arguments = parser.parse_args()
    started_s = time.monotonic()
    frames: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    failed = 0
    for chunk in campaign(arguments.frames, workers=arguments.workers, first_seed=arguments.first):
        frames[chunk.target] += chunk.frames
        refused[chunk.target] += chunk.refused
        if chunk.failure:
            failed += 1
            print(f"{chunk.target}, seed {chunk.seed}: {chunk.failure}", flush=True)
    for target, count in frames.items():
        print(f"{target:<22} {count:>9} frames  {refused[target] / count:6.1%} refused")
    print(f"{frames.total()} frames in {time.monotonic() - started_s:.0f} s, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
