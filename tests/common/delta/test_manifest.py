"""DeltaManifest: what is refused, and by which name."""

import random

import msgspec
import numpy as np
import pytest

from common.canary import Canary
from common.delta import (
    DeltaManifest,
    blocks_of,
    build_delta_manifest,
    decode_delta_manifest,
    encode_delta,
    encode_delta_manifest,
)
from common.delta.manifest import _whole_digest
from common.snapshot import (
    Chunked,
    SnapshotError,
    SnapshotManifest,
    TensorSpec,
    build_manifest,
    decode_manifest,
    encode_manifest,
    verify_all,
    verify_chunk,
)

N = 4096
CHUNK_BYTES = 512
FLIPS = 1000
NAMES_WHAT = r"manifest|tensor|snapshot \d|delta \d"  # what may not decode cannot tell its version
TENSORS = (TensorSpec("wide", (N // 2,), "float32", 0), TensorSpec("narrow", (N,), "bfloat16", 2 * N))


def a_snapshot(version: int) -> tuple[SnapshotManifest, bytes]:
    """Every version differs from the one before in some elements."""
    words = np.random.default_rng(0).integers(0, 1 << 16, 2 * N, dtype=np.uint16)
    words[:: 7 + version] += np.uint16(version)
    data = words.tobytes()
    canary = Canary(token_ids=(3, 1, 2), logprobs=(-1.25, -2.5), tolerance=0.1)
    manifest = build_manifest(
        memoryview(data), TENSORS, run_id="run", version=version, chunk_bytes=CHUNK_BYTES, canary=canary
    )
    return manifest, data


def a_delta() -> tuple[DeltaManifest, bytes]:
    (base, old), (target, new) = a_snapshot(1), a_snapshot(2)
    blocks = encode_delta(old, new, blocks_of(TENSORS))
    assert blocks is not None
    return build_delta_manifest(base, target, blocks, chunk_bytes=CHUNK_BYTES)


def changed(**changes: object) -> bytes:
    """A delta's manifest with other values, and a digest that fits them."""
    manifest = msgspec.structs.replace(a_delta()[0], **changes)
    return encode_delta_manifest(msgspec.structs.replace(manifest, digest=_whole_digest(manifest)))


def test_a_manifest_survives_the_wire():
    manifest, data = a_delta()
    assert decode_delta_manifest(encode_delta_manifest(manifest)) == manifest
    assert (manifest.title, manifest.version, manifest.num_bytes) == ("delta 1 to 2", 2, len(data))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_version": 2}, "delta 2 to 2 leads back"),
        ({"base_version": 3}, "delta 3 to 2 leads back"),
        ({"block_bytes": (100,)}, "has 1 blocks, its tensors 2"),
        ({"block_bytes": (3, 100)}, "is said to take 3"),
        ({"block_bytes": (100, 1 << 30)}, "is said to take 1073741824"),
        ({"chunk_bytes": 64}, "chunk digests, expected"),
        ({"target": msgspec.structs.replace(a_snapshot(2)[0], version=5)}, "snapshot 5 does not match its digest"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, complaint):
    with pytest.raises(SnapshotError, match=complaint):
        decode_delta_manifest(changed(**changes))


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_flipped_bit_anywhere_in_a_manifest_is_refused(kind: str):
    encoded, decode = {
        "full": (encode_manifest(a_snapshot(2)[0]), decode_manifest),
        "delta": (encode_delta_manifest(a_delta()[0]), decode_delta_manifest),
    }[kind]
    refusals: set[str] = set()
    for flipped in flips_of(encoded):
        with pytest.raises(SnapshotError, match=NAMES_WHAT) as refused:
            decode(flipped)
        refusals.add(str(refused.value))
    assert any(f"of {'snapshot 2' if kind == 'full' else 'delta 1 to 2'} does not match" in each for each in refusals)


@pytest.mark.parametrize("kind", ["full", "delta"])
def test_a_flipped_bit_anywhere_in_a_chunk_is_refused_by_the_name_of_the_chunk(kind: str):
    whole: tuple[Chunked, bytes] = a_snapshot(2) if kind == "full" else a_delta()
    manifest, data = whole
    randomness = random.Random(1)
    for _ in range(FLIPS):
        index = randomness.randrange(manifest.num_chunks)
        start, end = manifest.chunk_range(index)
        [flipped] = flips_of(data[start:end], 1, randomness)
        with pytest.raises(SnapshotError, match=f"chunk {index} of {manifest.title}: the digest does not match"):
            verify_chunk(manifest, index, flipped)


def test_a_flipped_bit_anywhere_in_memory_that_is_shared_is_refused_by_the_name_of_the_chunk():
    manifest, data = a_snapshot(2)
    randomness, memory = random.Random(2), bytearray(data)
    for _ in range(FLIPS):
        place, bit = randomness.randrange(len(memory)), 1 << randomness.randrange(8)
        memory[place] ^= bit
        with pytest.raises(SnapshotError, match=f"chunk {place // CHUNK_BYTES} of snapshot 2: the digest does not"):
            verify_all(manifest, memoryview(memory))
        memory[place] ^= bit


def flips_of(data: bytes, times: int = FLIPS, randomness: random.Random | None = None) -> list[bytes]:
    randomness = randomness or random.Random(0)
    flipped = []
    for _ in range(times):
        damaged = bytearray(data)
        damaged[randomness.randrange(len(data))] ^= 1 << randomness.randrange(8)
        flipped.append(bytes(damaged))
    return flipped
