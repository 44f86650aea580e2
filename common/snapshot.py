"""SnapshotManifest: what an immutable, versioned set of named tensors consists of, and how to verify its bytes.

A snapshot travels as one flat byte string, cut into chunks of equal size. The manifest names every tensor with its
place in that string, the digest of every chunk and of the whole.
"""

import math
from typing import Annotated, Literal

import msgspec
import xxhash
from msgspec import Meta

NO_VERSION = -1
"""A server that has not loaded any snapshot yet is at this version."""

NO_DIGEST = bytes(16)
CHUNK_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 16 << 20
MAX_SNAPSHOT_BYTES = 1 << 42

DType = Literal["float32", "bfloat16", "float16"]
ITEM_BYTES: dict[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}

Digest = Annotated[bytes, Meta(min_length=16, max_length=16)]
ByteCount = Annotated[int, Meta(ge=0, le=MAX_SNAPSHOT_BYTES)]


class SnapshotError(ValueError):
    """A manifest or the bytes it describes are not what they claim to be."""


class TensorSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One tensor, by its Hugging Face name, at [offset, offset + num_bytes) of the snapshot."""

    name: Annotated[str, Meta(min_length=1, max_length=512)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 40)], ...], Meta(max_length=8)]
    dtype: DType
    offset: ByteCount

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class SnapshotManifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a server must know to pull, verify and apply version `version` of run `run_id`."""

    run_id: Annotated[str, Meta(min_length=1, max_length=128)]
    version: Annotated[int, Meta(ge=0, lt=1 << 53)]
    base_version: Annotated[int, Meta(ge=0, lt=1 << 53)] | None = None  # None: full; else a delta against that version
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1 << 17)]
    num_bytes: ByteCount
    chunk_bytes: Annotated[int, Meta(ge=1, le=1 << 26)]
    chunk_digests: Annotated[tuple[Digest, ...], Meta(min_length=1)]
    digest: Digest  # of this manifest with zeros here: through the chunk digests it covers the whole snapshot

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_digests)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """[start, end) of chunk `index` in the snapshot; raises IndexError when there is no such chunk."""
        if not 0 <= index < self.num_chunks:
            raise IndexError(f"snapshot {self.version} has {self.num_chunks} chunks, no chunk {index}")
        start = index * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.num_bytes)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """128-bit XXH3: detects corruption at memory speed. Authenticity is the transport's business (CURVE)."""
    return xxhash.xxh3_128_digest(data)


def build_manifest(
    data: memoryview, tensors: tuple[TensorSpec, ...], *, run_id: str, version: int, chunk_bytes: int = CHUNK_BYTES
) -> SnapshotManifest:
    """The manifest of a full snapshot whose bytes are `data`."""
    starts = range(0, len(data), chunk_bytes)
    manifest = SnapshotManifest(
        run_id=run_id,
        version=version,
        tensors=tensors,
        num_bytes=len(data),
        chunk_bytes=chunk_bytes,
        chunk_digests=tuple(digest_of(data[start : start + chunk_bytes]) for start in starts),
        digest=NO_DIGEST,
    )
    return msgspec.structs.replace(manifest, digest=_whole_digest(manifest))


def _whole_digest(manifest: SnapshotManifest) -> bytes:
    return digest_of(encode_manifest(msgspec.structs.replace(manifest, digest=NO_DIGEST)))


def encode_manifest(manifest: SnapshotManifest) -> bytes:
    return msgspec.msgpack.encode(manifest)


_decoder = msgspec.msgpack.Decoder(SnapshotManifest)


def decode_manifest(data: bytes | memoryview) -> SnapshotManifest:
    """Parse and cross-check a manifest; raises SnapshotError naming what is wrong."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise SnapshotError(f"manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are accepted")
    try:
        manifest = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotError(f"manifest cannot be decoded: {error}") from error
    _check_layout(manifest)
    return manifest


def _check_layout(manifest: SnapshotManifest) -> None:
    if manifest.base_version is not None:
        raise SnapshotError(f"snapshot {manifest.version} is a delta against {manifest.base_version}; not supported")
    end = 0
    names: set[str] = set()
    for tensor in manifest.tensors:
        if tensor.name in names:
            raise SnapshotError(f"tensor {tensor.name} is named twice")
        names.add(tensor.name)
        if tensor.offset != end:
            raise SnapshotError(f"tensor {tensor.name} starts at {tensor.offset}, expected {end}")
        end += tensor.num_bytes
    if end != manifest.num_bytes:
        raise SnapshotError(f"tensors fill {end} bytes, the manifest says {manifest.num_bytes}")
    expected_chunks = -(-manifest.num_bytes // manifest.chunk_bytes)
    if manifest.num_chunks != expected_chunks:
        raise SnapshotError(f"{manifest.num_chunks} chunk digests, expected {expected_chunks}")
    if _whole_digest(manifest) != manifest.digest:
        raise SnapshotError(f"the manifest of snapshot {manifest.version} does not match its digest; pull it again")


def verify_chunk(manifest: SnapshotManifest, index: int, data: bytes | memoryview) -> None:
    """Raises SnapshotError unless `data` is chunk `index` of the snapshot, bit for bit."""
    where = f"chunk {index} of snapshot {manifest.version}"
    start, end = manifest.chunk_range(index)
    if len(data) != end - start:
        raise SnapshotError(f"{where}: expected {end - start} bytes, got {len(data)}")
    if digest_of(data) != manifest.chunk_digests[index]:
        raise SnapshotError(f"{where}: the digest does not match; pull it again")
