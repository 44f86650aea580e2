"""Versions of weights, the kernels that code their differences, and damaged blocks."""

import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from common.delta.block import HEADER_BYTES
from common.delta.compiled import COMPILERS, FLAGS, CompiledPrimitives, load_kernel
from common.delta.formats import FORMATS, Words

DTYPES = tuple(FORMATS)
NO_SIMD = ("-U__SSE2__", "-U__AVX512BW__", "-U__BMI2__")
KERNEL_FLAGS = {  # ways through the kernel's source, whatever this processor can do
    "native": FLAGS,
    "plain": tuple(flag for flag in FLAGS if not flag.startswith("-march")),
    "portable": (*FLAGS, *NO_SIMD),
}
FIELDS = struct.Struct("<BBBBIIII")  # version, format, flags, top, elements, changes, payload bytes, check

SPECIAL = {  # zeros, subnormals, one, the largest, infinity, quiet and signalling NaNs; then the same, negative
    "float32": (0, 1, 0x007FFFFF, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF),
    "bfloat16": (0, 1, 0x007F, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0, 0x7F81, 0x7FFF),
    "float16": (0, 1, 0x03FF, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01, 0x7FFF),
}


def a_kernel(directory: Path, variant: str = "native") -> CompiledPrimitives:
    """Compiled here and now; skips the test where there is no compiler."""
    if not any(map(shutil.which, COMPILERS)):
        pytest.skip("there is no C compiler")
    library = load_kernel(directory, KERNEL_FLAGS[variant])
    assert library is not None, "there is a compiler, but the kernel does not compile"
    return CompiledPrimitives(library)


def as_words(values: np.ndarray, dtype: str) -> Words:
    """Bit patterns of float32 values in the type, rounded to nearest even."""
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return values.astype(dtype).view(FORMATS[dtype].words)


def weights(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.normal(0, 0.02, size).astype(np.float32)


def special_patterns(dtype: str) -> Words:
    sign = 1 << (FORMATS[dtype].bits - 1)
    return np.array([*SPECIAL[dtype], *(pattern | sign for pattern in SPECIAL[dtype])], FORMATS[dtype].words)


def changed_at_random(rng: np.random.Generator, old: Words, density: float, largest_change: int = 3) -> Words:
    """Each element with probability `density` up to `largest_change` units in the last place away."""
    change = rng.integers(1, largest_change, old.size, endpoint=True) * rng.choice((-1, 1), old.size)
    change[rng.random(old.size) >= density] = 0
    return (old.astype(np.int64) + change).astype(old.dtype)  # modulo 2^bits


def after_an_adam_step(rng: np.random.Generator, values: np.ndarray, learning_rate: float) -> np.ndarray:
    step = np.clip(rng.normal(0, 0.5, values.size), -1, 1).astype(np.float32)
    return values + np.float32(learning_rate) * step


def entropy_bits(values: np.ndarray) -> float:
    """Of one of the values, when all are drawn independently from their own histogram."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / values.size
    return float(-(shares * np.log2(shares)).sum())


def sealed(fields: bytes, payload: bytes) -> bytes:
    """A block whose digest is right, whatever it says."""
    return fields + struct.pack("<Q", xxhash.xxh3_64_intdigest(fields + payload)) + payload


def with_field(block: bytes, index: int, value: int) -> bytes:
    """The block with one field of its header changed, and its digest made to match."""
    fields = list(FIELDS.unpack(block[: FIELDS.size]))
    fields[index] = value
    return sealed(FIELDS.pack(*fields), block[HEADER_BYTES:])


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flips bits, overwrites, cuts, inserts, repeats."""
    result = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        position = rng.randrange(len(result))
        match rng.randrange(6):
            case 0:
                result[position] ^= 1 << rng.randrange(8)
            case 1:
                result[position] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF))
            case 2:
                result[position : position + 4] = struct.pack("<I", rng.choice((0, 1, 1 << 31, (1 << 32) - 1)))
            case 3:
                del result[position + 1 :]
            case 4:
                result[position:position] = rng.randbytes(rng.randint(1, 8))
            case _:
                result[position : position + 40] = result[position : position + 40][::-1]
    return bytes(result)
