"""NumpyPrimitives: the loops over elements, as they are specified, and what runs where there is no compiler."""

import numpy as np
import numpy.typing as npt

from common.delta import numpy_changes
from common.delta.formats import NUM_CLASSES, U8, U32, ExponentOrder, Words


class NumpyPrimitives:
    """Primitives in numpy alone."""

    def find_changes(self, old: Words, new: Words) -> tuple[U32, U32]:
        positions = np.flatnonzero(old != new)
        difference = new[positions] - old[positions]  # modulo 2^bits
        sign = difference >> difference.dtype.type(difference.itemsize * 8 - 1)
        zigzag = (difference << difference.dtype.type(1)) ^ (np.zeros_like(sign) - sign)
        return positions.astype(np.uint32), zigzag.astype(np.uint32) - np.uint32(1)

    def new_values(self, base: Words, positions: U32, codes: U32) -> Words:
        zigzag = (codes + np.uint32(1)).astype(base.dtype)
        one = base.dtype.type(1)
        return base[positions] + ((zigzag >> one) ^ (np.zeros_like(zigzag) - (zigzag & one)))

    def into_order(self, old: Words, order: ExponentOrder, positions: U32, codes: U32) -> tuple[U32, U32]:
        changed = np.zeros(old.size, np.bool_)
        changed[positions] = True
        code_of = np.zeros(old.size, np.uint32)
        code_of[positions] = codes
        sequence = _sequence(old, order)
        places = np.flatnonzero(changed[sequence])
        return places.astype(np.uint32), code_of[sequence[places]]

    def out_of_order(self, base: Words, order: ExponentOrder, places: U32, codes: U32) -> tuple[U32, U32]:
        positions = _sequence(base, order)[places]
        by_position = np.argsort(positions)
        return positions[by_position].astype(np.uint32), codes[by_position]

    def pack_changes(self, universe: int, places: U32, codes: U32, room: int) -> bytes | None:
        packed = numpy_changes.pack_changes(universe, places, codes)
        return packed if len(packed) <= room else None

    def unpack_changes(self, data: U8, universe: int, count: int, bits: int) -> tuple[U32, U32]:
        return numpy_changes.unpack_changes(data, universe, count, bits)


def _sequence(words: Words, order: ExponentOrder) -> npt.NDArray[np.int64]:
    """Position of the element at every place of the order."""
    exponents = (words >> words.dtype.type(order.format.exponent_shift)).astype(np.int32) & order.format.exponent_mask
    classes = np.clip(order.top + 1 - exponents, 0, NUM_CLASSES - 1).astype(np.uint8)
    return np.argsort(classes, kind="stable")
