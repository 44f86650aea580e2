"""Placement: where a part of a snapshot's tensor lies within one of an engine's parameters.

Engines fuse tensors (q, k and v into one parameter), cut them (one part for each rank), and pad them.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Placement:
    """A part of a tensor, evenly strided, and where it lies in a parameter, there without a gap.

    Its dimensions go from the outermost to the innermost; those that continue each other are one.
    """

    tensor: str  # its Hugging Face name
    parameter: str  # the engine's name
    start: int  # of the part's first element, in the flat tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]  # elements of the flat tensor; each more than all that lies inside it spans
    destination: int  # of the part's first element, in the flat parameter

    @property
    def num_elements(self) -> int:
        return math.prod(self.sizes)

    def place(self, positions: I64) -> tuple[I64 | slice, I64]:
        """Of positions [M] in the flat tensor, ascending: which of them [K] are in the part, and where in the
        parameter [K] they lie, both ascending."""
        span = sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True)) + 1
        low, high = np.searchsorted(positions, [self.start, self.start + span])
        if self.strides == (1,):
            return slice(low, high), positions[low:high] + (self.destination - self.start)
        rest = positions[low:high] - self.start
        index, inside = np.zeros_like(rest), np.ones(rest.shape, dtype=bool)
        for size, stride in zip(self.sizes, self.strides, strict=True):
            coordinate, rest = np.divmod(rest, stride)
            inside &= coordinate < size
            index = index * size + coordinate
        inside &= rest == 0
        return low + np.flatnonzero(inside), index[inside] + self.destination


def nested_strides(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides of the same elements in the same order with as few dimensions as possible.

    None unless each stride is more than all that lies inside it spans: then an element has only one index.
    """
    kept: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if kept and kept[-1][1] == size * stride:
            kept[-1] = (kept[-1][0] * size, stride)
        else:
            kept.append((size, stride))
    span = 1
    for size, stride in reversed(kept):
        if stride < span:
            return None
        span += (size - 1) * stride
    kept = kept or [(1, 1)]
    return tuple(size for size, _ in kept), tuple(stride for _, stride in kept)
