"""Campaign: many damaged frames for all decoders, on several processes."""

import multiprocessing
import random
import resource
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

from tests.fuzz.targets import all_targets

CHUNK = 20_000  # frames for one decoder that a worker makes between two reports
MAX_GROWTH_BYTES = 256 << 20  # of a worker's memory within one chunk


@dataclass(frozen=True, slots=True)
class Chunk:
    """What came of some frames for one decoder."""

    target: str
    seed: int
    frames: int
    refused: int
    failure: str = ""  # the promise that was broken, or the error that was not declared


def campaign(frames: int, *, workers: int, first_seed: int = 0) -> Iterator[Chunk]:
    """About `frames` in all, as many for every decoder; a seed replays its chunk."""
    targets = all_targets()
    per_target = -(-frames // len(targets))
    chunks = [
        (place, first_seed + start, min(CHUNK, per_target - start))
        for start in range(0, per_target, CHUNK)
        for place in range(len(targets))
    ]
    pool = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext()
    with pool as processes:
        yield from processes.imap_unordered(_run, chunks) if processes else map(_run, chunks)


def _run(chunk: tuple[int, int, int]) -> Chunk:
    place, seed, frames = chunk
    target = all_targets()[place]
    rng = random.Random(f"{target.name} {seed}")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    refused = 0
    for number in range(frames):
        try:
            refused += target.refuses(rng)
        except Exception as error:  # noqa: BLE001 - whatever was not declared is what we look for
            return Chunk(target.name, seed, number + 1, refused, f"frame {number}: {type(error).__name__}: {error}")
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    failure = f"the process grew by {growth >> 20} MiB" if growth > MAX_GROWTH_BYTES else ""
    return Chunk(target.name, seed, frames, refused, failure)
