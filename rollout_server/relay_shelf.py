"""RelayShelf: the chunks that this server holds, verified, and may give on, in the memory where they lie anyway."""

import threading
from dataclasses import dataclass

import numpy as np

from common.codec import Frames
from common.delta import DeltaManifest
from common.snapshot import NO_DIGEST, NO_VERSION, SnapshotManifest
from common.snapshot_answers import ChunkLaterError
from common.weight_messages import ChunkRequest, ManifestRequest, MappingRequest


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A snapshot, or a delta, and which chunks of it are there."""

    manifest: SnapshotManifest | DeltaManifest
    memory: memoryview
    arrived: set[int]


class RelayShelf:
    """A SnapshotSource without manifests: what is being pulled, chunk by chunk, and what was pulled last.

    One thread pulls and another serves. A chunk is copied while it is certain not to change; memory: no more than a
    delta's bytes, which would be freed once they are applied. Nothing is kept before is_open.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.given_bytes = 0
        self.newest_version = NO_VERSION  # that a pull was begun of
        self._lock = threading.Lock()
        self._held: dict[bytes, Held] = {}  # by digest of the manifest
        self._pulling: Held | None = None
        self._coming = NO_DIGEST  # what the delta that is being pulled leads to

    def __repr__(self) -> str:
        held = ", ".join(f"{len(each.arrived)} chunks of {each.manifest.title}" for each in self._held.values())
        return f"<RelayShelf {held or 'empty'}>"

    def begin(self, manifest: SnapshotManifest | DeltaManifest, memory: memoryview) -> None:
        """It is being pulled into `memory`. Deltas before it are given up, and a snapshot, if this is one."""
        if not self.is_open:
            return
        with self._lock:
            is_delta = isinstance(manifest, DeltaManifest)
            self._held = {
                digest: held
                for digest, held in self._held.items()
                if is_delta and not isinstance(held.manifest, DeltaManifest)
            }
            self._pulling = self._held[manifest.digest] = Held(manifest, memory, set())
            self._coming = manifest.target.digest if isinstance(manifest, DeltaManifest) else NO_DIGEST
            self.newest_version = manifest.version

    def arrived(self, index: int) -> None:
        """Chunk `index` of what is being pulled lies in its place, verified."""
        if self._pulling is not None:
            self._pulling.arrived.add(index)

    def change(self) -> None:
        """The bytes of the last snapshot are about to change: it is not given any more once this returns."""
        with self._lock:
            self._held = {
                digest: held for digest, held in self._held.items() if isinstance(held.manifest, DeltaManifest)
            }

    def complete(self, manifest: SnapshotManifest, memory: memoryview) -> None:
        """What was pulled has become this snapshot, all of it verified."""
        if self.is_open:
            with self._lock:
                self._held[manifest.digest] = Held(manifest, memory, set(range(manifest.num_chunks)))
                self._pulling, self._coming = None, NO_DIGEST

    def withdraw(self) -> None:
        """Nothing is given any more once this returns."""
        with self._lock:
            self._held, self._pulling, self._coming = {}, None, NO_DIGEST

    def offer(self, request: ManifestRequest | MappingRequest) -> Frames | None:
        """See SnapshotSource. Manifests are the learner's alone."""
        return None

    def chunk(self, peer: bytes, request: ChunkRequest) -> memoryview | None:
        """See SnapshotSource. A version of which nothing is known here yet is taken to be on its way."""
        with self._lock:
            held = self._held.get(request.digest)
            if held is None:
                if request.version > self.newest_version or request.digest == self._coming != NO_DIGEST:
                    raise ChunkLaterError
                return None
            if request.index >= held.manifest.num_chunks:
                return None
            if request.index not in held.arrived:
                raise ChunkLaterError
            start, end = held.manifest.chunk_range(request.index)
            chunk = np.empty(end - start, np.uint8)
            np.copyto(chunk, np.frombuffer(held.memory[start:end], np.uint8))  # lets the engine's front go on
        self.given_bytes += chunk.size
        return chunk.data
