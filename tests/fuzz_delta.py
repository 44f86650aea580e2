"""Damaged deltas through the decoders of a kernel and of numpy: both refuse them, or both read the same.

`python -m tests.fuzz_delta KERNEL.so VERSIONS SEED` runs it alone, for a kernel with sanitizers in it.
"""

import ctypes
import random
import sys

import numpy as np

from common.delta import DeltaError, decode_block, encode_block
from common.delta.block import EXPONENT_ORDER, HEADER_BYTES
from common.delta.compiled import CompiledPrimitives
from common.delta.formats import FORMATS, ExponentOrder, Primitives, Words
from common.delta.primitives import NumpyPrimitives
from tests.builders_delta import (
    DTYPES,
    FIELDS,
    after_an_adam_step,
    as_words,
    changed_at_random,
    damage,
    sealed,
    special_patterns,
    weights,
)

SIZES = (0, 1, 2, 63, 64, 65, 511, 512, 513, 1000, 3000)
DAMAGES_PER_VERSION = 8

HOSTILE_LISTS = (  # said to be of one value, and what is wrong with them
    (b"\x01\0\0", "cut short"),
    (b"\x01\0\0\0", "cut short"),
    (b"\x03\0\0\0\x00\x01", "claims 3 bytes"),
    (b"\x04\0\0\0\x00\x01\x00\x00\x00", "claims 4 bytes"),
    (b"\xff\xff\xff\xff\x00\x01", "claims 4294967295 bytes"),
    (b"\x00\0\0\0\x00", "0 quotients in a list where 1"),
    (b"\x01\0\0\0\x00\x00", "0 quotients in a list where 1"),
    (b"\x01\0\0\0\x00\x03", "2 quotients in a list where 1"),
    (b"\x01\0\0\0\x1f\x01", "claims 1 bytes"),
    (b"\x03\0\0\0\x00\x00\x00\x20", "a quotient of 21"),
    (b"\x02\0\0\0\x00\x01\x00", "end before their bytes do"),
    (b"\x01\0\0\0\x20\x01", "padding after the parameters"),
    (b"\x01\0\0\0\x02\x01", "cut short"),
    (b"\x01\0\0\0\x02\x01\x04", "padding after the remainders"),
    (b"\x03\0\0\0\x00\x00\x00\x10", "escaped values of a list are cut short"),
    (b"\x03\0\0\0\x00\x00\x00\x10\x20\0\0", "escaped values of a list are cut short"),
    (b"\x03\0\0\0\x00\x00\x00\x10\x13\0\0\0", "out of its range"),
    (b"\x03\0\0\0\x04\x00\x00\x10\x05\xff\xff\xff\xff", "out of its range"),
    (b"\x01\0\0\0\x1e\x10\x00\x00\x00\x00", "out of its range"),
)
REST_OF_ONE_CHANGE = bytes(9)  # its sign, and that it is by one unit in the last place


def two_versions(rng: np.random.Generator, dtype: str) -> tuple[Words, Words]:
    """Weights of every kind: trained a little or a lot, strange patterns, unrelated."""
    values = weights(rng, int(rng.choice(SIZES)))
    old = as_words(values, dtype)
    kind = rng.integers(5)
    if kind == 0:
        return old, as_words(after_an_adam_step(rng, values, 10.0 ** -rng.integers(2, 8)), dtype)
    if kind == 1:
        return old, rng.integers(0, np.iinfo(old.dtype).max, old.size, old.dtype, endpoint=True)
    if kind == 2:
        return rng.choice(special_patterns(dtype), old.size), rng.choice(special_patterns(dtype), old.size)
    density = rng.choice((0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0))
    return old, changed_at_random(rng, old, float(density), int(rng.choice((1, 3, 30, 30_000))))


def outcome(primitives: Primitives, payload: bytes, base: Words, fields: tuple[int, ...], dtype: str) -> object:
    """What a decoder makes of a payload: arrays as bytes, or None when it refuses."""
    _, _, flags, top, _, changes, _, _ = fields
    data = np.frombuffer(payload, np.uint8)
    try:
        positions, codes = primitives.unpack_changes(data, base.size, changes, FORMATS[dtype].bits)
        if flags == EXPONENT_ORDER:
            order = ExponentOrder(top, FORMATS[dtype])
            positions, codes = primitives.out_of_order(base, order, positions, codes)
        values = primitives.new_values(base, positions, codes)
    except DeltaError:
        return None
    return positions.tobytes(), codes.tobytes(), values.tobytes()


def fuzz(kernel: Primitives, *, versions: int, seed: int) -> dict[str, int]:
    """Counts of what happened: {"refused": ..., "read": ...}. Raises AssertionError on a disagreement."""
    rng, damages = np.random.default_rng(seed), random.Random(seed)
    counts = {"refused": 0, "read": 0}
    for version in range(versions):
        dtype = DTYPES[version % len(DTYPES)]
        old, new = two_versions(rng, dtype)
        block = encode_block(old, new, dtype, kernel)
        assert block == encode_block(old, new, dtype, NumpyPrimitives())
        decode_block(block, old, dtype, kernel).apply_to(restored := old.copy())
        assert restored.tobytes() == new.tobytes()
        fields = FIELDS.unpack(block[: FIELDS.size])
        for _ in range(DAMAGES_PER_VERSION):
            payload = damage(block[HEADER_BYTES:], damages)
            claimed = (*fields[:5], damages.choice((fields[5], damages.randint(0, old.size))), *fields[6:])
            read = outcome(kernel, payload, old, claimed, dtype)
            assert read == outcome(NumpyPrimitives(), payload, old, claimed, dtype)
            counts["refused" if read is None else "read"] += 1
            decode_damaged(block, payload, claimed, old, dtype, kernel)
    return counts


def refuse_hostile_lists(primitives: Primitives) -> None:
    """As the places of one change, in memory that ends where they do, and before a rest that would do."""
    for data, reason in HOSTILE_LISTS:
        for rest in (b"", REST_OF_ONE_CHANGE):
            try:
                read = primitives.unpack_changes(np.frombuffer(data + rest, np.uint8), 1 << 24, 1, 16)
            except DeltaError:
                continue
            raise AssertionError(f"read {read} from {data + rest!r}, in which {reason}")


def decode_damaged(
    block: bytes, payload: bytes, fields: tuple[int, ...], base: Words, dtype: str, kernel: Primitives
) -> None:
    """The whole decoder on the damaged payload, under a digest that matches, and on a damaged header."""
    resealed = sealed(FIELDS.pack(*fields[:6], len(payload), fields[7]), payload)
    header = damage(block[: FIELDS.size], random.Random(len(payload)))[: FIELDS.size].ljust(FIELDS.size, b"\0")
    for data in (resealed, sealed(header, block[HEADER_BYTES:])):
        try:
            changes = decode_block(data, base, dtype, kernel)
        except DeltaError:
            continue
        assert changes.positions.size == changes.values.size <= base.size
        assert np.all(np.diff(changes.positions.astype(np.int64)) > 0)
        changes.apply_to(base.copy())  # no position is out of bounds


def main() -> int:
    library, versions, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    kernel = CompiledPrimitives(ctypes.CDLL(library))
    refuse_hostile_lists(kernel)
    counts = fuzz(kernel, versions=versions, seed=seed)
    sys.stdout.write(f"{counts}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
