"""The delta of a whole snapshot: which blocks it consists of, and whether it pays.

Both sides derive the blocks from the tensors of the manifest. Blocks are independent of each other: one can be decoded
while the next is on its way and the one after that is being encoded, and several can be encoded at once (the kernel
runs without the interpreter's lock).
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from common.delta.block import Changes, encode_block
from common.delta.formats import FORMATS, Primitives, Words
from common.snapshot import ITEM_BYTES, DType, TensorSpec

BLOCK_ELEMENTS = 1 << 20
MAX_DELTA_SHARE = 0.5  # of the full snapshot's bytes: above it, what is saved is not worth the coding
SAMPLE_EVERY = 8  # blocks: these are encoded first, and none of the others if they say that it will not pay
MIN_BLOCKS_TO_SAMPLE = 32
SAMPLE_SLACK = 1.25  # times MAX_DELTA_SHARE

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class BlockPlace:
    """Neighbouring elements of one type, [start, start + num_bytes) of the snapshot."""

    dtype: DType
    start: int
    num_elements: int

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    def words_of(self, snapshot: Buffer) -> Words:
        """[num_elements] the block's bit patterns in the bytes of a snapshot, not copied; writable where those are."""
        return np.frombuffer(snapshot, FORMATS[self.dtype].words, self.num_elements, self.start)


@dataclass(frozen=True, slots=True, eq=False)
class TensorChanges:
    """The elements of one tensor that change."""

    tensor: TensorSpec
    positions: npt.NDArray[np.int64]  # [M] in the flattened tensor, ascending
    values: Words  # [M] the new bit patterns


def blocks_of(tensors: Sequence[TensorSpec], max_elements: int = BLOCK_ELEMENTS) -> tuple[BlockPlace, ...]:
    """The blocks of a snapshot that holds the tensors one after the other, as a checked manifest says.

    Tensors of one type that follow each other share blocks: a model has thousands of tiny ones.
    """
    blocks: list[BlockPlace] = []
    for dtype, start, num_elements in _runs(tensors):
        for first in range(0, num_elements, max_elements):
            count = min(max_elements, num_elements - first)
            blocks.append(BlockPlace(dtype, start + first * ITEM_BYTES[dtype], count))
    return tuple(blocks)


def encode_delta(
    old: Buffer, new: Buffer, blocks: Sequence[BlockPlace], primitives: Primitives | None = None
) -> list[bytes] | None:
    """The encoded blocks that lead from snapshot `old` to `new`; None as soon as a full one is clearly better."""
    left = MAX_DELTA_SHARE * sum(block.num_bytes for block in blocks)
    sample = range(0, len(blocks), SAMPLE_EVERY) if len(blocks) >= MIN_BLOCKS_TO_SAMPLE else range(0)
    encoded: dict[int, bytes] = {}
    for index in (*sample, *(index for index in range(len(blocks)) if index not in sample)):
        block = blocks[index]
        encoded[index] = encode_block(block.words_of(old), block.words_of(new), block.dtype, primitives)
        left -= len(encoded[index])
        if left < 0 or (len(encoded) == len(sample) and not _may_pay(blocks, encoded)):
            return None
    return [encoded[index] for index in range(len(blocks))]


def _may_pay(blocks: Sequence[BlockPlace], encoded: Mapping[int, bytes]) -> bool:
    """By a sample of the blocks."""
    share = sum(map(len, encoded.values())) / sum(blocks[index].num_bytes for index in encoded)
    return share <= SAMPLE_SLACK * MAX_DELTA_SHARE


def changes_by_tensor(block: BlockPlace, changes: Changes, tensors: Sequence[TensorSpec]) -> Iterator[TensorChanges]:
    """The changes of a block, tensor by tensor, for an engine that applies them in place."""
    item_bytes = ITEM_BYTES[block.dtype]
    index = bisect_right(tensors, block.start, key=lambda tensor: tensor.offset) - 1
    low = 0
    while index < len(tensors) and low < changes.positions.size:
        tensor = tensors[index]
        first = (tensor.offset - block.start) // item_bytes  # negative when the tensor begins in an earlier block
        end = np.uint32(min(first + tensor.num_bytes // item_bytes, block.num_elements))
        high = int(np.searchsorted(changes.positions, end))
        if low < high:
            positions = changes.positions[low:high].astype(np.int64) - first
            yield TensorChanges(tensor, positions, changes.values[low:high])
        low = high
        index += 1


def _runs(tensors: Sequence[TensorSpec]) -> Iterator[tuple[DType, int, int]]:
    """(type, first byte, elements) of each longest row of tensors of one type."""
    start, index = 0, 0
    while index < len(tensors):
        dtype, num_bytes = tensors[index].dtype, 0
        while index < len(tensors) and tensors[index].dtype == dtype:
            num_bytes += tensors[index].num_bytes
            index += 1
        yield dtype, start, num_bytes // ITEM_BYTES[dtype]
        start += num_bytes
