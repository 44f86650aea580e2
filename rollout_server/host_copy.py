"""HostCopy: the weights in this process's memory, at one version, and what the last delta changed in them.

Both lie in anonymous files that vanish with the process; other processes of this user read them by path.
Memory: the bytes of the model, and for each element that the last delta changed 4 bytes and its own.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from common.delta import BlockPlace, Changes, DeltaManifest, changes_by_tensor
from common.snapshot import SnapshotManifest, verify_all
from rollout_server.local_changes import LocalChanges

BlockChanges = tuple[BlockPlace, Changes]


class HostCopy:
    """`manifest` says what the bytes are; None while they are not wholly those of any one version."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("countercurrent-snapshot")
        self._changes_descriptor = os.memfd_create("countercurrent-changes")
        self._mapping: mmap.mmap | None = None
        self._is_cold = True  # no page of it may exist yet
        self.manifest: SnapshotManifest | None = None

    def __repr__(self) -> str:
        return f"<HostCopy of {self.manifest.title if self.manifest is not None else 'nothing known'}>"

    @property
    def path(self) -> Path:
        return Path(f"/proc/{os.getpid()}/fd/{self._descriptor}")

    @property
    def memory(self) -> memoryview:
        """All bytes, writable."""
        assert self._mapping is not None
        return memoryview(self._mapping)

    def begin(self, num_bytes: int) -> None:
        """A full snapshot of so many bytes will be written: what the bytes are is not known until it says so."""
        self.manifest = None
        self._is_cold = self._mapping is None or len(self._mapping) != num_bytes
        if not self._is_cold:
            return
        self._mapping = None  # unmapped with the last view of it, which the traceback of an error may still hold
        os.ftruncate(self._descriptor, num_bytes)
        self._mapping = mmap.mmap(self._descriptor, num_bytes)

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Pages that do not exist yet are made through the file: one fault after the other takes twice as long."""
        assert self._mapping is not None
        end = start + len(data)
        assert end <= len(self._mapping)
        if not self._is_cold:
            self._mapping[start:end] = data
            return
        rest = memoryview(data)
        while rest:
            rest = rest[os.pwrite(self._descriptor, rest, end - len(rest)) :]

    def apply(self, delta: DeltaManifest, changes: Sequence[BlockChanges]) -> LocalChanges:
        """Bring the copy to the version of delta.target, and verify all of it.

        Raises SnapshotError when the result is not that version; what the bytes are is then not known.
        """
        self.manifest = None
        memory = self.memory
        for block, changed in changes:
            changed.apply_to(block.words_of(memory))
        verify_all(delta.target, memory)
        written = self._write_changes(delta, changes)
        self.manifest = delta.target
        return written

    def _write_changes(self, delta: DeltaManifest, changes: Sequence[BlockChanges]) -> LocalChanges:
        parts = (
            (part.tensor.name, part.positions, part.values)
            for block, changed in changes
            for part in changes_by_tensor(block, changed, delta.target.tensors)
        )
        path = Path(f"/proc/{os.getpid()}/fd/{self._changes_descriptor}")
        return LocalChanges.write(path, delta.target, delta.base_version, parts)

    def close(self) -> None:
        self._mapping = None
        os.close(self._descriptor)
        os.close(self._changes_descriptor)
