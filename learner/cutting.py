"""Cutting: trajectories of a batch -> micro-batches under a token budget, as many for each part, of like size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from learner.shared_prompts import Unit, saves_enough
from learner.training import BatchLayout

_MOST_PADDED = 4  # times the budget; log-probabilities are padded, and attention copies a shared prompt's keys


def cut_into_micro_batches(
    lengths: Sequence[int], micro_batch_tokens: int, layout: BatchLayout, units: Sequence[Unit] | None = None
) -> list[list[int]]:
    """Places of trajectories, one list per micro-batch; those of the parts in turn, the shortest first.

    A turn holds trajectories of similar length, so that little is padded, each given to the part with the fewest tokens
    so far. A trajectory beyond the budget goes alone.

    units: of trajectories whose prompt is computed once, which stay together where the budget lets them.
    """
    budget = micro_batch_tokens * layout.ranks_per_sequence
    if units is None:
        pieces = [_Piece([index], length, length) for index, length in enumerate(lengths)]
    else:
        pieces = list(_pieces(units, lengths, budget, layout.num_parts))
    turns: list[list[_Bin]] = []
    # Ties by place, so that the cut depends on nothing else.
    for piece in sorted(pieces, key=lambda each: (each.num_tokens, each.indexes[0]), reverse=True):
        if turns:
            bins = sorted(turns[-1], key=lambda each: each.num_tokens)
            if any(each.takes(piece, budget) for each in bins):
                continue
        turns.append([_Bin(layout) if units is None else _SharingBin(layout) for _ in range(layout.num_parts)])
        turns[-1][0].takes(piece, budget)
    return [each.indexes[::-1] for turn in reversed(turns) for each in turn]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Trajectories that go into the same micro-batch, and the tokens that are computed of them."""

    indexes: Sequence[int]
    num_tokens: int
    longest: int

    @property
    def num_padded(self) -> int:
        return len(self.indexes) * self.longest


def _pieces(units: Sequence[Unit], lengths: Sequence[int], budget: int, num_parts: int) -> Iterator[_Piece]:
    """Units, each cut into as few pieces, of about as many trajectories, as the parts and the budget need."""
    share_of_a_part = (sum(lengths) - sum(unit.saved for unit in units)) / num_parts
    for unit in units:
        indexes = range(unit.first, unit.first + unit.count)
        shares = round(_piece(indexes, lengths, unit.prefix).num_tokens / share_of_a_part)
        for num_pieces in range(min(max(shares, 1), unit.count), unit.count + 1):
            pieces = [_piece(each.tolist(), lengths, unit.prefix) for each in np.array_split(indexes, num_pieces)]
            if all(each.num_tokens <= budget and each.num_padded <= _MOST_PADDED * budget for each in pieces):
                break
        yield from pieces


def _piece(indexes: Sequence[int], lengths: Sequence[int], prefix: int) -> _Piece:
    tokens = [lengths[index] for index in indexes]
    return _Piece(indexes, sum(tokens) - (len(tokens) - 1) * prefix, max(tokens))


class _Bin:
    """A micro-batch that is being filled, the longest trajectory first, each a piece of its own."""

    def __init__(self, layout: BatchLayout) -> None:
        self._layout = layout
        self._longest = 0
        self._rows: list[int] = []  # tokens in each
        self.indexes: list[int] = []  # last to first
        self.num_tokens = 0

    def takes(self, piece: _Piece, budget: int) -> bool:
        """Whether the trajectory fits, and is in it from now on."""
        self._longest = self._longest or piece.longest
        row = self._row_for(piece.longest)
        num_rows = max(len(self._rows), row + 1)
        computed = self.num_tokens + piece.longest if self._layout.in_one_row else num_rows * self._longest
        if self.indexes and computed > budget:
            return False
        self._rows += [0] * (num_rows - len(self._rows))
        self._rows[row] += piece.longest
        self._add(piece)
        return True

    def _add(self, piece: _Piece) -> None:
        self.indexes.extend(reversed(piece.indexes))
        self.num_tokens += piece.num_tokens

    def _row_for(self, length: int) -> int:
        """As lay_out_rows() will find it; without packing, a row for each."""
        fits = (row for row, used in enumerate(self._rows) if used + length <= self._longest)
        return next(fits, len(self._rows)) if self._layout.packs else len(self._rows)


class _SharingBin(_Bin):
    """Of pieces whose prompt is computed once."""

    def takes(self, piece: _Piece, budget: int) -> bool:
        longest, count = max(self._longest, piece.longest), len(self.indexes) + len(piece.indexes)
        padded, row = longest * count, self.num_tokens + piece.num_tokens
        computed = row if saves_enough(row, padded) else padded
        if self.indexes and (computed > budget or padded > _MOST_PADDED * budget):
            return False
        self._longest = longest
        self._add(piece)
        return True
