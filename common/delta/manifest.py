"""DeltaManifest: what leads from one published version to the next, and how to verify it.

A delta travels as its encoded blocks, one after the other, cut into chunks of equal size. The manifest of the version
it leads to is part of it: whoever applied it verifies all bytes of the result, not only those that changed.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from common.delta.block import HEADER_BYTES
from common.delta.plan import blocks_of
from common.snapshot import (
    CHUNK_BYTES,
    NO_DIGEST,
    ByteCount,
    Digest,
    SnapshotError,
    SnapshotManifest,
    check_manifest,
    decode_doubted,
    digest_of,
    digests_of_chunks,
    place_of_chunk,
)


class DeltaManifest(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Everything a server that holds `base_version` must know to bring its copy to the version of `target`."""

    base_version: Annotated[int, Meta(ge=0, lt=1 << 53)]
    base_digest: Digest  # of the base's manifest: its number alone would not tell another run's version
    target: SnapshotManifest
    block_bytes: tuple[ByteCount, ...]  # encoded length of each of blocks_of(target.tensors)
    chunk_bytes: Annotated[int, Meta(ge=1, le=1 << 26)]
    chunk_digests: tuple[Digest, ...]
    digest: Digest  # of this manifest with zeros here

    @property
    def version(self) -> int:
        return self.target.version

    @property
    def title(self) -> str:
        return f"delta {self.base_version} to {self.version}"

    @property
    def num_bytes(self) -> int:
        return sum(self.block_bytes)

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_digests)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """[start, end) of chunk `index` in the delta; raises IndexError when there is no such chunk."""
        return place_of_chunk(self, index, self.chunk_bytes)


def build_delta_manifest(
    base: SnapshotManifest, target: SnapshotManifest, blocks: Sequence[bytes], *, chunk_bytes: int = CHUNK_BYTES
) -> tuple[DeltaManifest, bytes]:
    """The manifest of the encoded blocks that lead from base to target, and the bytes that travel."""
    data = b"".join(blocks)
    manifest = DeltaManifest(
        base_version=base.version,
        base_digest=base.digest,
        target=target,
        block_bytes=tuple(map(len, blocks)),
        chunk_bytes=chunk_bytes,
        chunk_digests=digests_of_chunks(memoryview(data), chunk_bytes),
        digest=NO_DIGEST,
    )
    return msgspec.structs.replace(manifest, digest=_whole_digest(manifest)), data


def encode_delta_manifest(manifest: DeltaManifest) -> bytes:
    return msgspec.msgpack.encode(manifest)


_decoder = msgspec.msgpack.Decoder(DeltaManifest)


def decode_delta_manifest(data: bytes | memoryview) -> DeltaManifest:
    """Parse and cross-check a manifest; raises SnapshotError naming what is wrong."""
    manifest = decode_doubted(data, _decoder)
    if _whole_digest(manifest) != manifest.digest:
        raise SnapshotError(f"the manifest of {manifest.title} does not match its digest; pull it again")
    check_manifest(manifest.target)
    _check_parts(manifest)
    return manifest


def _check_parts(manifest: DeltaManifest) -> None:
    if manifest.base_version >= manifest.version:
        raise SnapshotError(f"{manifest.title} leads back")
    blocks = blocks_of(manifest.target.tensors)
    if len(blocks) != len(manifest.block_bytes):
        raise SnapshotError(f"{manifest.title} has {len(manifest.block_bytes)} blocks, its tensors {len(blocks)}")
    for block, num_bytes in zip(blocks, manifest.block_bytes, strict=True):
        if not HEADER_BYTES <= num_bytes <= HEADER_BYTES + block.num_bytes:
            raise SnapshotError(f"{manifest.title}: a block of {block.num_bytes} bytes is said to take {num_bytes}")
    expected = -(-manifest.num_bytes // manifest.chunk_bytes)
    if manifest.num_chunks != expected:
        raise SnapshotError(f"{manifest.title} has {manifest.num_chunks} chunk digests, expected {expected}")


def _whole_digest(manifest: DeltaManifest) -> bytes:
    return digest_of(encode_delta_manifest(msgspec.structs.replace(manifest, digest=NO_DIGEST)))
