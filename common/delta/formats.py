"""What both ends of a delta agree on: the float formats, the numbers of the code, and DeltaError."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.snapshot import DType

Words = npt.NDArray[np.unsignedinteger[Any]]
"""[N] the bit patterns of floats: uint16 or uint32."""
U32 = npt.NDArray[np.uint32]
U8 = npt.NDArray[np.uint8]

GROUP = 128  # consecutive values of a list that share a Rice parameter
PARAMETER_BITS = 5
ALL_ZERO = 31  # the parameter of a group of zeros, which takes no further bits
MAX_PARAMETER = 30
MAX_QUOTIENT = 20  # a longer quotient is written in 32 bits of its own
NUM_CLASSES = 16  # of exponents; see ExponentOrder
LIST_HEADER_BYTES = 4


class DeltaError(ValueError):
    """A delta, or the base that it is to be applied to, is not what it claims to be."""


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """How a float is laid out in an unsigned integer, as far as the code makes use of it."""

    name: DType
    code: int  # on the wire
    words: type[np.uint16] | type[np.uint32]
    exponent_shift: int
    exponent_mask: int

    @property
    def bits(self) -> int:
        return np.dtype(self.words).itemsize * 8


FORMATS: dict[str, FloatFormat] = {
    "float32": FloatFormat("float32", 1, np.uint32, 23, 0xFF),
    "bfloat16": FloatFormat("bfloat16", 2, np.uint16, 7, 0xFF),
    "float16": FloatFormat("float16", 3, np.uint16, 10, 0x1F),
}


@dataclass(frozen=True, slots=True)
class ExponentOrder:
    """The elements of a block sorted by the exponent of their old value, equal ones by position.

    Small weights change far more often than large ones, and both sides know which are small. Sorted like this the
    changes of one exponent lie together, with a Rice parameter of their own.
    Class 0 holds the exponents above `top`, class 1 `top` itself, and so on; the last one holds all that is smaller.
    """

    top: int  # about the largest exponent of an element that changes
    format: FloatFormat


class Primitives(Protocol):
    """The loops over elements. Two implementations with identical results: numpy, and a compiled kernel."""

    def find_changes(self, old: Words, new: Words) -> tuple[U32, U32]:
        """(positions [M], ascending; codes [M]) of the elements that differ; a code is zigzag(new - old) - 1."""

    def new_values(self, base: Words, positions: U32, codes: U32) -> Words:
        """[M] what the elements at `positions` become. The inverse of find_changes."""

    def into_order(self, old: Words, order: ExponentOrder, positions: U32, codes: U32) -> tuple[U32, U32]:
        """(places [M], ascending; codes [M]): the changes where they lie in the order."""

    def out_of_order(self, base: Words, order: ExponentOrder, places: U32, codes: U32) -> tuple[U32, U32]:
        """The inverse of into_order. Places must be ascending and below N."""

    def pack_changes(self, universe: int, places: U32, codes: U32, room: int) -> bytes | None:
        """The changes in the layout of numpy_changes.py; None when they do not fit into `room` bytes."""

    def unpack_changes(self, data: U8, universe: int, count: int, bits: int) -> tuple[U32, U32]:
        """(places [count], codes [count]) in floats of `bits` bits.

        Raises DeltaError unless `data` is what pack_changes makes of such changes.
        """
