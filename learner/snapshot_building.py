"""SnapshotBuilder: from a slot of raw bytes to what servers pull, the manifest of the whole and the delta."""

import asyncio
import time
from dataclasses import dataclass

from common.canary import Canary
from common.delta import blocks_of, build_delta_manifest, encode_delta
from common.lifecycle import DedicatedThread
from common.snapshot import AdapterSpec, SnapshotManifest, TensorSpec, build_manifest
from learner.delta_shelf import Delta


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BuiltSnapshot:
    manifest: SnapshotManifest
    delta: Delta | None  # None: there is no base, or it does not pay
    seconds: float


class SnapshotBuilder:
    """Hashes and encodes at the same time, on two threads; neither holds the interpreter's lock for long."""

    def __init__(self, run_id: str, chunk_bytes: int, adapter: AdapterSpec | None = None) -> None:
        """adapter: what every version is, unless it is the whole policy."""
        self._adapter = adapter
        self._run_id = run_id
        self._chunk_bytes = chunk_bytes
        self._hashing = DedicatedThread("hashing")
        self._encoding = DedicatedThread("encoding")

    def close(self) -> None:
        self._hashing.close()
        self._encoding.close()

    async def build(
        self,
        version: int,
        data: memoryview,
        layout: tuple[TensorSpec, ...],
        base: tuple[SnapshotManifest, memoryview] | None,
        canary: Canary | None = None,
    ) -> BuiltSnapshot:
        """data and the bytes of the base must not change meanwhile."""
        start_s = time.monotonic()
        manifest, blocks = await asyncio.gather(
            self._hashing.run(self._hash, data, layout, version, canary),
            self._encoding.run(_encode, base, data, layout),
        )
        delta = None
        if base is not None and blocks is not None:
            delta = await self._hashing.run(self._hash_delta, base[0], manifest, blocks)
        return BuiltSnapshot(manifest=manifest, delta=delta, seconds=time.monotonic() - start_s)

    def _hash(
        self, data: memoryview, layout: tuple[TensorSpec, ...], version: int, canary: Canary | None
    ) -> SnapshotManifest:
        return build_manifest(
            data,
            layout,
            run_id=self._run_id,
            version=version,
            chunk_bytes=self._chunk_bytes,
            canary=canary,
            adapter=self._adapter,
        )

    def _hash_delta(self, base: SnapshotManifest, target: SnapshotManifest, blocks: list[bytes]) -> Delta:
        return Delta(*build_delta_manifest(base, target, blocks, chunk_bytes=self._chunk_bytes))


def _encode(
    base: tuple[SnapshotManifest, memoryview] | None, data: memoryview, layout: tuple[TensorSpec, ...]
) -> list[bytes] | None:
    if base is None or base[0].tensors != layout:
        return None
    return encode_delta(base[1], data, blocks_of(layout))
