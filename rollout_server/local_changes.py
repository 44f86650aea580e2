"""LocalChanges: a file that says what is different in a version of the weights, for an engine that applies it in place.

It holds the indices of all tensors, then their values. So whoever applies it looks at what changed and at nothing else.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.snapshot import ITEM_BYTES, SnapshotManifest

I64 = npt.NDArray[np.int64]
Words = npt.NDArray[Any]  # bit patterns, unsigned, as wide as the tensor's elements
TensorChanges = tuple[str, npt.NDArray[Any], Words]
"""(tensor, positions [M] in it, ascending, the new bit patterns [M])."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalChanges:
    """Which elements of a snapshot differ, in any bit, from those of base_version, and what they are now."""

    base_version: int
    path: Path  # indices, uint32, or uint64 if a tensor has 2**32 elements or more; then as many values
    tensors: tuple[tuple[str, int, int], ...]  # (name, start, count): items [start, start + count) of both are its own

    @classmethod
    def write(
        cls, path: Path, manifest: SnapshotManifest, base_version: int, changes: Iterable[TensorChanges]
    ) -> "LocalChanges":
        """Of the snapshot that the manifest describes; a tensor's may come in several pieces, ascending."""
        index_type = _index_type(manifest)
        ranges: list[tuple[str, int, int]] = []
        values: list[Words] = []
        end = 0
        with path.open("wb") as file:
            for name, positions, words in changes:
                start, count = end, positions.size
                if ranges and ranges[-1][0] == name:
                    _, start, before = ranges.pop()
                    count += before
                ranges.append((name, start, count))
                values.append(words)
                file.write(positions.astype(index_type).data)
                end = start + count
            for words in values:
                file.write(words.data)
        return cls(base_version=base_version, path=path, tensors=tuple(ranges))

    @property
    def num_changed(self) -> int:
        return sum(count for _, _, count in self.tensors)

    def read(self, manifest: SnapshotManifest) -> Iterator[tuple[str, I64, Words]]:
        """Tensor by tensor, copied."""
        index_type, dtypes = _index_type(manifest), {tensor.name: tensor.dtype for tensor in manifest.tensors}
        offset = self.num_changed * index_type.itemsize
        with _mapped(self.path) as data:
            for name, start, count in self.tensors:
                words = np.dtype(f"<u{ITEM_BYTES[dtypes[name]]}")
                positions = np.frombuffer(data, index_type, count, start * index_type.itemsize).astype(np.int64)
                yield name, positions, np.frombuffer(data, words, count, offset).copy()
                offset += count * words.itemsize


def _index_type(manifest: SnapshotManifest) -> np.dtype[Any]:
    most = max(tensor.num_bytes // ITEM_BYTES[tensor.dtype] for tensor in manifest.tensors)
    return np.dtype("<u4" if most < 1 << 32 else "<u8")


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """All bytes of a file, which may be empty."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield memoryview(b"")
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as view:
            yield view
