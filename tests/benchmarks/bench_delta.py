"""Bytes and time of a weight delta, beside what others do and beside a plain copy, all in turns in the same run.

Two kinds of changes: scattered evenly (the same at every weight, up to three units in the last place), and those of an
Adam step, which change small weights far more often than large ones. Run as `python -m tests.benchmarks.bench_delta`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from common.delta.compiled import load_kernel, primitives
from common.delta.formats import Words
from common.delta.primitives import NumpyPrimitives
from tests.benchmarks.delta_schemes import (
    Scheme,
    delta_scheme,
    entropy_bound_bytes,
    index_value_scheme,
    xor_zstd_scheme,
)

DENSITIES = (0.001, 0.01, 0.05)
LEARNING_RATES = (1e-7, 1e-6, 3e-6)  # with these weights 0.25 %, 1.8 % and 4.6 % change
PIECE = 1 << 22  # elements made at a time
MAX_BYTES_OVER_XOR, MAX_BYTES_OVER_BOUND, MAX_ENCODE_OVER_COPY = 0.6, 1.25, 9.0
GOAL_BYTES_OVER_XOR, GOAL_BYTES_OVER_BOUND, GOAL_ENCODE_OVER_COPY = 0.5, 1.10, 2.5
GATE_DENSITY = 0.01

T = TypeVar("T")


class Watch:
    """Wall and processor time of calls, as multiples of a copy's in the same round."""

    def __init__(self) -> None:
        self._times: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        wall, processor = time.perf_counter(), time.process_time()
        result = work()
        self._times.setdefault(name, []).append((time.perf_counter() - wall, time.process_time() - processor))
        return result

    def copies(self, name: str) -> tuple[float, float]:
        """(wall, processor) time over that of "copy": medians of the rounds' own ratios."""
        rounds = list(zip(self._times[name], self._times["copy"], strict=True))
        return (
            statistics.median(taken[0] / copy[0] for taken, copy in rounds),
            statistics.median(taken[1] / copy[1] for taken, copy in rounds),
        )

    def milliseconds(self, name: str) -> float:
        return 1e3 * statistics.median(wall for wall, _ in self._times[name])


def rounded(values: np.ndarray) -> Words:
    """float32 -> bfloat16, to nearest even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def versions(elements: int, change: Callable[[np.random.Generator, np.ndarray], Words]) -> tuple[Words, Words]:
    """N(0, 0.02) weights and what `change` makes of each piece of them."""
    rng = np.random.default_rng(0)
    old, new = np.empty(elements, np.uint16), np.empty(elements, np.uint16)
    for start in range(0, elements, PIECE):
        piece = slice(start, min(start + PIECE, elements))
        values = rng.standard_normal(old[piece].size, np.float32) * np.float32(0.02)
        old[piece] = rounded(values)
        new[piece] = change(rng, values)
    return old, new


def scattered(density: float) -> Callable[[np.random.Generator, np.ndarray], Words]:
    def change(rng: np.random.Generator, values: np.ndarray) -> Words:
        steps = rng.choice(np.array([-3, -2, -1, 1, 2, 3], np.int16), values.size)
        steps[rng.random(values.size, np.float32) >= density] = 0
        return rounded(values) + steps.view(np.uint16)

    return change


def adam_step(learning_rate: float) -> Callable[[np.random.Generator, np.ndarray], Words]:
    def change(rng: np.random.Generator, values: np.ndarray) -> Words:
        step = np.clip(rng.standard_normal(values.size, np.float32) * np.float32(0.5), -1, 1)
        return rounded(values + np.float32(learning_rate) * step)

    return change


def measure(old: Words, new: Words, schemes: list[Scheme], rounds: int) -> tuple[Watch, dict[str, int]]:
    """All schemes in turns; every one must restore the new version."""
    watch, sizes = Watch(), dict[str, int]()
    copy, base = old.copy(), old.copy()
    for _ in range(rounds):
        watch.time("copy", lambda: np.copyto(copy, new))
        for scheme in schemes:
            np.copyto(base, old)
            parts = watch.time(f"{scheme.name} encode", lambda scheme=scheme: scheme.encode(old, new))
            decoded = watch.time(f"{scheme.name} decode", lambda scheme=scheme, parts=parts: scheme.decode(parts, base))
            watch.time(f"{scheme.name} apply", lambda scheme=scheme, decoded=decoded: scheme.apply(decoded, base))
            if not np.array_equal(base, new):
                raise AssertionError(f"{scheme.name} does not restore the new version")
            sizes[scheme.name] = sum(map(len, parts))
    return watch, sizes


def report(title: str, old: Words, new: Words, schemes: list[Scheme], rounds: int) -> tuple[float, float, float]:
    """Prints a table. Returns ours: (bytes over XOR's, over the bound, processor time of encoding over a copy's)."""
    watch, sizes = measure(old, new, schemes, rounds)
    density = np.count_nonzero(old != new) / old.size
    bound = entropy_bound_bytes(old, new)
    xor = sizes["XOR + zstd-1"]
    print(f"\n{title}: {density:.2%} of {old.size / 1e6:.0f} M bfloat16 change; full {old.nbytes / 1e6:.0f} MB, bound "
          f"{bound / 1e6:.3f} MB; one copy {watch.milliseconds('copy'):.1f} ms")  # fmt: skip
    print("                      MB   1/full  of XOR  of bound | times one copy, wall (processor):"
          "  encode          decode           apply")  # fmt: skip
    for scheme in schemes:
        size = sizes[scheme.name]
        times = [watch.copies(f"{scheme.name} {step}") for step in ("encode", "decode", "apply")]
        columns = "  ".join(f"{wall:6.2f} ({processor:6.2f})" for wall, processor in times)
        print(f"{scheme.name:15} {size / 1e6:9.3f} {old.nbytes / size:8.0f} {size / xor:7.2f} {size / bound:9.3f} "
              f"|{'':23}{columns}", flush=True)  # fmt: skip
    ours = schemes[0].name
    return sizes[ours] / xor, sizes[ours] / bound, watch.copies(f"{ours} encode")[1]


def verdict(what: str, value: float, gate: float, goal: float) -> bool:
    met = "goal met" if value <= goal else "gate met" if value <= gate else "MISSED"
    print(f"  {what}: {value:.3f} (gate {gate}, goal {goal}): {met}")
    return value <= gate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--elements", type=int, default=100_000_000, help="of the model (default: 100 million)")
    parser.add_argument("--rounds", type=int, default=5, help="of each table (default: 5)")
    parser.add_argument("--numpy", action="store_true", help="measure the coder without a compiler as well")
    arguments = parser.parse_args()
    schemes = [delta_scheme("delta", primitives()), xor_zstd_scheme(), index_value_scheme()]
    if arguments.numpy:
        schemes.append(delta_scheme("delta, numpy", NumpyPrimitives()))
    print(f"coded by {'the compiled kernel' if load_kernel() else 'numpy: there is no compiler here'}, on one core")
    cases = [(f"scattered, {density:.1%}", scattered(density), density) for density in DENSITIES]
    cases += [(f"Adam step at {rate:.0e}", adam_step(rate), 0.0) for rate in LEARNING_RATES]
    passed = True
    for title, change, density in cases:
        old, new = versions(arguments.elements, change)
        over_xor, over_bound, over_copy = report(title, old, new, schemes, arguments.rounds)
        passed &= verdict("bytes over XOR + zstd-1", over_xor, MAX_BYTES_OVER_XOR, GOAL_BYTES_OVER_XOR)
        passed &= verdict("bytes over the bound", over_bound, MAX_BYTES_OVER_BOUND, GOAL_BYTES_OVER_BOUND)
        if density == GATE_DENSITY:
            passed &= verdict("encoding over a copy", over_copy, MAX_ENCODE_OVER_COPY, GOAL_ENCODE_OVER_COPY)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
