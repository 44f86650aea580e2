"""Shared prompts: which trajectories begin with the same tokens, so that these need be computed only once.

Tokens alone say so: under a causal model the same tokens at the same positions have the same hidden states, whichever
group they belong to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

_LEAST_SAVED = 0.02  # of a unit's tokens; fewer are not worth a segment of their own
_LARGEST_MASK = 1 << 26  # bytes; an answer attends to its prompt with a mask, and without one where it is alone
_MOST_COMPUTED = 0.95  # of the padded tokens


@dataclass(frozen=True, slots=True)
class Unit:
    """Trajectories that follow one another and begin with the same `prefix` tokens. Alone, one has no prefix."""

    first: int
    count: int
    prefix: int

    @property
    def saved(self) -> int:
        """Tokens that are not computed again."""
        return (self.count - 1) * self.prefix


def saves_enough(row_tokens: int, padded_tokens: int) -> bool:
    """Whether to compute trajectories in a row of segments, of so many tokens, rather than padded to one length.

    Taking the row apart around attention costs about as much as some hundredths of the tokens.
    """
    return row_tokens <= _MOST_COMPUTED * padded_tokens


def find_units(token_ids: Sequence[np.ndarray]) -> list[Unit]:
    """All trajectories, in their order, in units that save as many tokens as units of neighbours can.

    token_ids: [T] of each trajectory.
    """
    pieces = {index: _Piece(index, index + 1, 0, [Unit(index, 1, 0)]) for index in range(len(token_ids))}
    ends = {piece.end: piece for piece in pieces.values()}
    common = [_common_prefix(one, other) for one, other in pairwise(token_ids)]
    # The longest first, so that what is joined has a prefix at least as long as the one it is joined by.
    for index in sorted(range(len(common)), key=lambda each: (-common[each], each)):
        joined = _join(ends.pop(index + 1), pieces.pop(index + 1), common[index])
        pieces[joined.first] = ends[joined.end] = joined
    lengths = [len(token_ids_T) for token_ids_T in token_ids]
    return [unit for piece in pieces.values() for each in piece.units for unit in _worthwhile(each, lengths)]


@dataclass(slots=True)
class _Piece:
    """Trajectories `first` up to `end`, in the units found for them so far."""

    first: int
    end: int
    saved: int
    units: list[Unit]


def _join(left: _Piece, right: _Piece, prefix: int) -> _Piece:
    """As one unit, where that saves more than what both have been cut into."""
    whole = Unit(left.first, right.end - left.first, prefix)
    if whole.saved > left.saved + right.saved:
        return _Piece(left.first, right.end, whole.saved, [whole])
    return _Piece(left.first, right.end, left.saved + right.saved, left.units + right.units)


def _common_prefix(one_T: np.ndarray, other_T: np.ndarray) -> int:
    length = min(len(one_T), len(other_T))
    differs_T = one_T[:length] != other_T[:length]
    return int(differs_T.argmax()) if differs_T.any() else length


def _worthwhile(unit: Unit, lengths: Sequence[int]) -> list[Unit]:
    """Its trajectories one by one, where too little is shared or its mask would be too large."""
    of_unit = lengths[unit.first : unit.first + unit.count]
    longest = max(of_unit)
    saves = unit.saved >= _LEAST_SAVED * sum(of_unit) and (longest - unit.prefix) * longest <= _LARGEST_MASK
    if unit.count == 1 or saves:
        return [unit]
    return [Unit(index, 1, 0) for index in range(unit.first, unit.first + unit.count)]
