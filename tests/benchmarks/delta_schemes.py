"""Ways to send the difference of two versions of bfloat16 weights: ours, and what others do."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import zstandard

from common.delta import BLOCK_ELEMENTS, decode_block, encode_block
from common.delta.formats import Primitives, Words

ZSTD_LEVEL = 1


@dataclass(frozen=True)
class Scheme:
    """encode(old, new) -> parts; apply(parts, base) brings the base to the new version, in place."""

    name: str
    encode: Callable[[Words, Words], list[bytes]]
    decode: Callable[[list[bytes], Words], list[object]]  # what can be done before the engine is paused
    apply: Callable[[list[object], Words], None]


def blocks(words: Words) -> list[Words]:
    return [words[start : start + BLOCK_ELEMENTS] for start in range(0, words.size, BLOCK_ELEMENTS)]


def delta_scheme(name: str, primitives: Primitives) -> Scheme:
    def encode(old: Words, new: Words) -> list[bytes]:
        pairs = zip(blocks(old), blocks(new), strict=True)
        return [encode_block(before, after, "bfloat16", primitives) for before, after in pairs]

    def decode(parts: list[bytes], base: Words) -> list[object]:
        pairs = zip(parts, blocks(base), strict=True)
        return [decode_block(part, block, "bfloat16", primitives) for part, block in pairs]

    def apply(decoded: list[object], base: Words) -> None:
        for changes, block in zip(decoded, blocks(base), strict=True):
            changes.apply_to(block)

    return Scheme(name, encode, decode, apply)


def xor_zstd_scheme() -> Scheme:
    """XOR of the raw bytes, compressed (slime, SkyRL)."""
    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    decompressor = zstandard.ZstdDecompressor()

    def encode(old: Words, new: Words) -> list[bytes]:
        return [compressor.compress(before ^ after) for before, after in zip(blocks(old), blocks(new), strict=True)]

    def decode(parts: list[bytes], base: Words) -> list[object]:
        return [np.frombuffer(decompressor.decompress(part), base.dtype) for part in parts]

    def apply(decoded: list[object], base: Words) -> None:
        for difference, block in zip(decoded, blocks(base), strict=True):
            block ^= difference

    return Scheme("XOR + zstd-1", encode, decode, apply)


def index_value_scheme() -> Scheme:
    """int32 positions and bfloat16 values (vLLM's sparse path, TRL, vime)."""

    def encode(old: Words, new: Words) -> list[bytes]:
        positions = np.flatnonzero(old != new).astype(np.int32)
        return [positions.tobytes(), new[positions].tobytes()]

    def decode(parts: list[bytes], base: Words) -> list[object]:
        return [np.frombuffer(parts[0], np.int32), np.frombuffer(parts[1], base.dtype)]

    def apply(decoded: list[object], base: Words) -> None:
        base[decoded[0]] = decoded[1]

    return Scheme("int32 + bf16", encode, decode, apply)


def entropy_bits(values: np.ndarray) -> float:
    """Of one value, when all are drawn independently from their own histogram."""
    _, counts = np.unique(values, return_counts=True)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0


def entropy_bound_bytes(old: Words, new: Words) -> float:
    """N·H(changed) + changes·H(difference): what independent changes take that the old values tell nothing about."""
    changed = old != new
    num_changed = int(np.count_nonzero(changed))
    share = num_changed / old.size
    if share in (0.0, 1.0):
        position_bits = 0.0
    else:
        position_bits = -old.size * (share * np.log2(share) + (1 - share) * np.log2(1 - share))
    value_bits = num_changed * entropy_bits(new[changed] - old[changed]) if num_changed else 0.0
    return float(position_bits + value_bits) / 8
