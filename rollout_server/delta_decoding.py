"""DeltaDecoder: decodes a delta while its chunks arrive, without touching the copy it is made for."""

from itertools import accumulate, pairwise

from common.delta import DeltaError, DeltaManifest, blocks_of, decode_block
from common.snapshot import SnapshotError
from rollout_server.host_copy import BlockChanges, HostCopy


class DeltaDecoder:
    """Blocks are decoded in order, each as soon as all bytes up to its end are there."""

    def __init__(self, manifest: DeltaManifest, copy: HostCopy) -> None:
        """Raises SnapshotError when the delta is not for what the copy holds."""
        held = copy.manifest
        if held is None or manifest.base_digest != held.digest:
            raise SnapshotError(f"{manifest.title} is for another base than the {copy!r}")
        self._manifest = manifest
        self._copy = copy
        self._data = bytearray(manifest.num_bytes)
        self._arrived: set[int] = set()
        self._num_whole_chunks = 0  # from the first on, without a gap
        self._ends = list(pairwise(accumulate(manifest.block_bytes, initial=0)))
        self._blocks = blocks_of(manifest.target.tensors)
        self._num_decoded = 0
        self.changes: list[BlockChanges] = []

    @property
    def is_complete(self) -> bool:
        return self._num_decoded == len(self._blocks)

    @property
    def data(self) -> memoryview:
        """The delta, as far as its chunks have come."""
        return memoryview(self._data).toreadonly()

    def add(self, index: int, chunk: bytes | memoryview) -> None:
        """Chunk `index`, verified."""
        start, end = self._manifest.chunk_range(index)
        self._data[start:end] = chunk
        self._arrived.add(index)
        while self._num_whole_chunks in self._arrived:
            self._num_whole_chunks += 1

    def decode_arrived(self) -> None:
        """Raises SnapshotError when a block does not fit the base."""
        available = min(self._num_whole_chunks * self._manifest.chunk_bytes, len(self._data))
        memory, data = self._copy.memory, self.data
        while not self.is_complete and self._ends[self._num_decoded][1] <= available:
            start, end = self._ends[self._num_decoded]
            self._decode(data[start:end], memory)
            self._num_decoded += 1

    def _decode(self, encoded: memoryview, memory: memoryview) -> None:
        block = self._blocks[self._num_decoded]
        try:
            changes = decode_block(encoded, block.words_of(memory), block.dtype)
        except DeltaError as error:
            raise SnapshotError(f"{self._manifest.title}, block {self._num_decoded}: {error}") from error
        if changes.positions.size:
            self.changes.append((block, changes))
