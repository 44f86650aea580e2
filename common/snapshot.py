"""SnapshotManifest: what an immutable, versioned set of named tensors consists of, and how to verify its bytes.

A snapshot is one flat byte string, cut into chunks of equal size. The manifest names every tensor with its place in
that string, the digest of every chunk and of the whole. It travels as it is, or as a delta, see delta/manifest.py.
"""

import math
from typing import Annotated, Literal, Protocol, TypeVar

import msgspec
import xxhash
from msgspec import Meta

from common.canary import Canary

NO_VERSION = -1
"""A server that has not loaded any snapshot yet is at this version; the base model of adapters is of none."""

T = TypeVar("T")

NO_DIGEST = bytes(16)
CHUNK_BYTES = 1 << 20
BASE_MODEL_TITLE = "the base model of the adapters"
MAX_MANIFEST_BYTES = 16 << 20
MAX_SNAPSHOT_BYTES = 1 << 42
MAX_ADAPTER_RANK = 1 << 16

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


class Chunked(Protocol):
    """What is pulled chunk by chunk: a snapshot, or a delta."""

    @property
    def title(self) -> str: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def chunk_digests(self) -> tuple[bytes, ...]: ...
    @property
    def digest(self) -> bytes: ...
    @property
    def num_chunks(self) -> int: ...
    def chunk_range(self, index: int) -> tuple[int, int]: ...


class AdapterSpec(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """What a snapshot is that is an adapter: W x of the base model becomes W x + alpha / rank B A x.

    Hu et al. 2021 (arXiv:2106.09685). Its tensors are A [rank, inputs] and B [outputs, rank] by their PEFT names.
    """

    base_model: Digest  # content_digest of the base model's manifest
    rank: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]
    alpha: Annotated[float, Meta(gt=0.0, le=1e9)]
    target_modules: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=256)], ...], Meta(min_length=1, max_length=256)
    ]  # last parts of the names of the linear layers that have one, such as q_proj


class SnapshotManifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a server must know to pull, verify and apply version `version` of run `run_id`."""

    run_id: Annotated[str, Meta(min_length=1, max_length=128)]
    version: Annotated[int, Meta(ge=NO_VERSION, lt=1 << 53)]  # NO_VERSION: the base model that adapters stand beside
    tensors: Annotated[tuple[TensorSpec, ...], Meta(min_length=1, max_length=1 << 17)]
    num_bytes: ByteCount
    chunk_bytes: Annotated[int, Meta(ge=1, le=1 << 26)]
    chunk_digests: Annotated[tuple[Digest, ...], Meta(min_length=1)]
    digest: Digest  # of this manifest with zeros here: through the chunk digests it covers the whole snapshot
    canary: Canary | None = None  # what an engine must compute with these weights; None: nobody computed it
    adapter: AdapterSpec | None = None  # None: the tensors are the whole policy, or the base model

    @property
    def title(self) -> str:
        return BASE_MODEL_TITLE if self.is_base_model else f"snapshot {self.version}"

    @property
    def is_base_model(self) -> bool:
        return self.version == NO_VERSION

    @property
    def content_digest(self) -> bytes:
        """Of names, shapes, types and bytes: the same in every run that starts from them."""
        return digest_of(msgspec.msgpack.encode((self.tensors, self.chunk_bytes, self.chunk_digests)))

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_digests)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """[start, end) of chunk `index` in the snapshot; raises IndexError when there is no such chunk."""
        return place_of_chunk(self, index, self.chunk_bytes)


def place_of_chunk(whole: Chunked, index: int, chunk_bytes: int) -> tuple[int, int]:
    """[start, end) of chunk `index` where all but the last have chunk_bytes; raises IndexError for no such chunk."""
    if not 0 <= index < whole.num_chunks:
        raise IndexError(f"{whole.title} has {whole.num_chunks} chunks, no chunk {index}")
    start = index * chunk_bytes
    return start, min(start + chunk_bytes, whole.num_bytes)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """128-bit XXH3: detects corruption at memory speed. Authenticity is the transport's business (CURVE)."""
    return xxhash.xxh3_128_digest(data)


def digests_of_chunks(data: memoryview, chunk_bytes: int) -> tuple[bytes, ...]:
    return tuple(digest_of(data[start : start + chunk_bytes]) for start in range(0, len(data), chunk_bytes))


def build_manifest(
    data: memoryview,
    tensors: tuple[TensorSpec, ...],
    *,
    run_id: str,
    version: int,
    chunk_bytes: int = CHUNK_BYTES,
    canary: Canary | None = None,
    adapter: AdapterSpec | None = None,
) -> SnapshotManifest:
    """The manifest of a full snapshot whose bytes are `data`."""
    manifest = SnapshotManifest(
        run_id=run_id,
        version=version,
        tensors=tensors,
        num_bytes=len(data),
        chunk_bytes=chunk_bytes,
        chunk_digests=digests_of_chunks(data, chunk_bytes),
        digest=NO_DIGEST,
        canary=canary,
        adapter=adapter,
    )
    return msgspec.structs.replace(manifest, digest=_whole_digest(manifest))


def _whole_digest(manifest: SnapshotManifest) -> bytes:
    return digest_of(encode_manifest(msgspec.structs.replace(manifest, digest=NO_DIGEST)))


def encode_manifest(manifest: SnapshotManifest) -> bytes:
    return msgspec.msgpack.encode(manifest)


_decoder = msgspec.msgpack.Decoder(SnapshotManifest)


def decode_manifest(data: bytes | memoryview) -> SnapshotManifest:
    """Parse and cross-check a manifest; raises SnapshotError naming what is wrong."""
    manifest = decode_doubted(data, _decoder)
    check_manifest(manifest)
    return manifest


def decode_doubted(data: bytes | memoryview, decoder: msgspec.msgpack.Decoder[T]) -> T:
    """Raises SnapshotError for what is too long, or no manifest of this kind."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise SnapshotError(f"manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES} are accepted")
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise SnapshotError(f"manifest cannot be decoded: {error}") from error


def check_manifest(manifest: SnapshotManifest) -> None:
    """Raises SnapshotError unless its parts fit together and its digest is right."""
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
    _check_kind(manifest)
    if _whole_digest(manifest) != manifest.digest:
        raise SnapshotError(f"the manifest of snapshot {manifest.version} does not match its digest; pull it again")


def _check_kind(manifest: SnapshotManifest) -> None:
    if manifest.is_base_model and (manifest.canary is not None or manifest.adapter is not None):
        raise SnapshotError("a base model is no adapter, and no policy that has a canary")
    if manifest.canary is not None and not manifest.canary.is_whole:
        raise SnapshotError(f"the canary of snapshot {manifest.version} has not one log-probability for each token")


def verify_chunk(manifest: Chunked, index: int, data: bytes | memoryview) -> None:
    """Raises SnapshotError unless `data` is chunk `index` of the snapshot or delta, bit for bit."""
    where = f"chunk {index} of {manifest.title}"
    start, end = manifest.chunk_range(index)
    if len(data) != end - start:
        raise SnapshotError(f"{where}: expected {end - start} bytes, got {len(data)}")
    if digest_of(data) != manifest.chunk_digests[index]:
        raise SnapshotError(f"{where}: the digest does not match; pull it again")


def verify_all(manifest: Chunked, data: memoryview) -> None:
    """Raises SnapshotError unless every chunk of `data` is as the manifest says."""
    for index in range(manifest.num_chunks):
        start, end = manifest.chunk_range(index)
        verify_chunk(manifest, index, data[start:end])
