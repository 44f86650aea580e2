"""The changes of a block as bytes: nested sets, of which each is a list of gaps.

    places        which of the N elements changed
    signs         one bit for each change
    above 1, 2    which changes are larger than one unit in the last place, and which of those are larger than two
    magnitudes    of those, less 3

A set of more than half of its universe is coded as its complement. All are lists of numpy_lists.py.
"""

import numpy as np
import numpy.typing as npt

from common.delta.formats import U8, U32, DeltaError
from common.delta.numpy_lists import pack_list, unpack_list

NUM_LEVELS = 2
COUNT_BYTES = 4

I64 = npt.NDArray[np.int64]


def pack_changes(universe: int, places: U32, codes: U32) -> bytes:
    """places [M]: ascending, below `universe`; codes [M]: zigzag - 1 of the differences."""
    signs = np.packbits((codes & 1).astype(np.uint8), bitorder="little")
    parts = [_pack_set(places, universe), signs.tobytes()]
    magnitudes = codes >> np.uint32(1)
    for _ in range(NUM_LEVELS):
        above = np.flatnonzero(magnitudes).astype(np.uint32)
        parts += [above.size.to_bytes(COUNT_BYTES, "little"), _pack_set(above, magnitudes.size)]
        magnitudes = magnitudes[above] - np.uint32(1)
    if magnitudes.size:
        parts.append(pack_list(magnitudes))
    return b"".join(parts)


def unpack_changes(data: U8, universe: int, count: int, bits: int) -> tuple[U32, U32]:
    """(places [count], codes [count]) of floats of `bits` bits.

    Raises DeltaError unless `data` is what pack_changes makes of such changes.
    """
    reader = _Reader(data)
    places = reader.take_set(count, universe)
    signs = reader.take_bits(count)
    levels: list[I64] = []
    sizes = [count]
    for _ in range(NUM_LEVELS):
        sizes.append(reader.take_count(at_most=sizes[-1]))
        levels.append(reader.take_set(sizes[-1], sizes[-2]))
    magnitudes = reader.take_list(sizes[-1]).astype(np.int64)
    reader.require_end()
    for level, size in zip(reversed(levels), reversed(sizes[:-1]), strict=True):
        larger, magnitudes = magnitudes, np.zeros(size, np.int64)
        magnitudes[level] = larger + 1
    codes = (magnitudes << 1) | signs
    if count and codes.max() >= (1 << bits) - 1:
        raise DeltaError(f"a difference does not fit into {bits} bits")
    return places.astype(np.uint32), codes.astype(np.uint32)


def _is_complemented(count: int, universe: int) -> bool:
    return 2 * count > universe


def _complement(members: I64 | U32, universe: int) -> I64:
    others = np.ones(universe, np.bool_)
    others[members] = False
    return np.flatnonzero(others)


def _pack_set(members: U32, universe: int) -> bytes:
    if _is_complemented(members.size, universe):
        members = _complement(members, universe).astype(np.uint32)
    if members.size == 0:
        return b""
    gaps = members.copy()
    gaps[1:] -= members[:-1] + np.uint32(1)
    return pack_list(gaps)


class _Reader:
    """Takes one part after the other from the bytes; raises DeltaError where a part is not there."""

    def __init__(self, data: U8) -> None:
        self._rest = data

    def _take(self, num_bytes: int, what: str) -> U8:
        if num_bytes > self._rest.size:
            raise DeltaError(f"the {what} of a delta take {num_bytes} bytes, {self._rest.size} are left")
        taken, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return taken

    def take_count(self, *, at_most: int) -> int:
        count = int.from_bytes(self._take(COUNT_BYTES, "counts").tobytes(), "little")
        if count > at_most:
            raise DeltaError(f"{count} of {at_most} changes are said to be larger")
        return count

    def take_bits(self, count: int) -> U8:
        data = self._take(-(-count // 8), "signs")
        bits = np.unpackbits(data, bitorder="little")
        if bits[count:].any():
            raise DeltaError("the padding after the signs is not zero")
        return bits[:count]

    def take_list(self, count: int) -> U32:
        if count == 0:
            return np.empty(0, np.uint32)
        values, used = unpack_list(self._rest, count)
        self._rest = self._rest[used:]
        return values

    def take_set(self, count: int, universe: int) -> I64:
        complemented = _is_complemented(count, universe)
        gaps = self.take_list(universe - count if complemented else count)
        members = np.cumsum(gaps.astype(np.int64) + 1) - 1
        if members.size and members[-1] >= universe:
            raise DeltaError(f"position {members[-1]} in a set of {universe}")
        return _complement(members, universe) if complemented else members

    def require_end(self) -> None:
        if self._rest.size:
            raise DeltaError(f"{self._rest.size} bytes follow the end of a delta")
