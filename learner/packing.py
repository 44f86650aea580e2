"""Packing: several trajectories behind one another in a row, so that the network computes next to no padding.

Positions begin anew with each trajectory, and that is what keeps them apart: transformers makes a block-diagonal mask
of them, or variable-length calls of flash attention. Only so: with an attention mask, or a cache, the rows would
silently be read as one long text each. B = trajectories, T = tokens (padded), R = rows, L = tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from learner.segments import segmented_inputs
from learner.sequence_parallel import SequenceRanks, spread_inputs
from learner.taking import take

FLASH: Final = "flash_attention_2"
_CHECKED_LENGTHS = (5, 3, 2)
_CHECKED_WITH_PROMPT = (7, 6, 6, 4, 2)  # of which the first four have a prompt of three tokens
_CHECKED_PROMPT = 3
_TOLERANCE = {
    torch.float32: 1e-3,
    torch.bfloat16: 0.1,
}  # of the largest hidden value; a mixed-up row is off by far more


@dataclass(frozen=True, slots=True)
class Places:
    """Where each trajectory lies: from `start` on in `row`."""

    rows: Sequence[int]
    starts: Sequence[int]
    num_rows: int
    row_length: int

    @property
    def num_tokens(self) -> int:
        """That the network computes, padding included."""
        return self.num_rows * self.row_length


def lay_out_rows(lengths: Sequence[int], *, in_one_row: bool = False, multiple: int = 1) -> Places:
    """First fit, the longest first, into rows as long as the longest trajectory, or up to a multiple of `multiple`.

    So attention over whole rows costs no more than over padded trajectories. in_one_row: for attention that costs
    nothing between trajectories.
    """
    row_length = _rounded_up(sum(lengths) if in_one_row else max(lengths), multiple)
    rows, starts, filled = [0] * len(lengths), [0] * len(lengths), list[int]()
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        row = next((row for row, used in enumerate(filled) if used + lengths[index] <= row_length), len(filled))
        if row == len(filled):
            filled.append(0)
        rows[index], starts[index] = row, filled[row]
        filled[row] += lengths[index]
    return Places(rows, starts, len(filled), row_length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """How a network lays out a micro-batch for its body; by default each trajectory in a row of its own, padded."""

    packs: bool = False  # several in a row
    shares: bool = False  # prompts are computed once, in a row of segments, where that pays: see learner/segments.py
    ranks: SequenceRanks | None = None  # that compute each row together, a stretch of its tokens each


PADDED = Arrangement()


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where the tokens of a micro-batch are in what a model returns."""

    places_BT: Tensor  # int64 in P = R * L; anything outside the attention mask
    row_length: int
    ranks: SequenceRanks | None = None  # that hold a stretch of each row, so that P = R * L / ranks.size

    def on_this_rank(self) -> tuple[Tensor, Tensor]:
        """(places_BT in what this rank returns, bool [B, T]: whether it is this rank that has the token)."""
        if self.ranks is None:
            return self.places_BT, torch.ones_like(self.places_BT, dtype=torch.bool)
        length = self.row_length // self.ranks.size
        rows_BT, columns_BT = self.places_BT // self.row_length, self.places_BT % self.row_length
        return rows_BT * length + columns_BT % length, columns_BT // length == self.ranks.rank


class HiddenStates:
    """What a model's body says of a micro-batch, to be asked for by the places of tokens in it."""

    def __init__(self, hidden_PH: Tensor, whereabouts: Whereabouts) -> None:
        self.flat_PH = hidden_PH  # P, all places of all rows, as far as this rank has them
        self._ranks = whereabouts.ranks
        self._places_BT, self.is_here_BT = whereabouts.on_this_rank()  # the second: bool, which tokens this rank has

    def following(self, asked_BT: Tensor) -> Tensor:
        """Those of the tokens in asked_BT whose predecessor is on this rank; the first column is left out."""
        return nn.functional.pad(asked_BT[:, 1:] & self.is_here_BT[:, :-1], (1, 0))

    def before(self, predicted_BT: Tensor) -> Tensor:
        """[N, H]: of the tokens that stand before those in predicted_BT, which this rank has."""
        return take(self.flat_PH, self._places_BT[:, :-1][predicted_BT[:, 1:]])

    def at(self, mask_BT: Tensor) -> Tensor:
        """[M, H]: of those tokens in mask_BT that are on this rank."""
        return self.flat_PH[self._places_BT[mask_BT & self.is_here_BT]]

    def spread(self, values_P: Tensor) -> Tensor:
        """[B, T]: one value for each place, of all ranks, at its token."""
        return self.of_all_ranks(torch.where(self.is_here_BT, values_P[self._places_BT], 0.0))

    def of_all_ranks(self, values_BT: Tensor) -> Tensor:
        """What each rank says of its tokens, being 0 elsewhere: on each rank all of it."""
        return values_BT if self._ranks is None else self._ranks.summed(values_BT)


def run_body(body: Any, token_ids_BT: Tensor, attention_mask_BT: Tensor, arrangement: Arrangement) -> HiddenStates:
    """The last hidden states of a transformers model without its output layer."""
    inputs, whereabouts = body_inputs(body, token_ids_BT, attention_mask_BT, arrangement)
    return HiddenStates(body(**inputs).last_hidden_state.flatten(0, 1), whereabouts)


def body_inputs(
    model: Any, token_ids_BT: Tensor, attention_mask_BT: Tensor, arrangement: Arrangement
) -> tuple[dict[str, Any], Whereabouts]:
    """(keyword arguments of a transformers model, where the tokens are in what it returns)."""
    ranks = arrangement.ranks
    if arrangement.shares and (segmented := segmented_inputs(token_ids_BT, attention_mask_BT)) is not None:
        inputs, places_BT = segmented
        return inputs, Whereabouts(places_BT, inputs["input_ids"].shape[1])
    multiple = 1 if ranks is None else ranks.size
    if arrangement.packs:
        return _packed_inputs(model, token_ids_BT, attention_mask_BT, multiple, ranks)
    row_length = _rounded_up(token_ids_BT.shape[1], multiple)
    places_BT = torch.arange(len(token_ids_BT) * row_length, device=token_ids_BT.device).view(-1, row_length)
    whereabouts = Whereabouts(places_BT[:, : token_ids_BT.shape[1]], row_length, ranks)
    if ranks is None:
        return {
            "input_ids": token_ids_BT, "attention_mask": attention_mask_BT.long(), "use_cache": False,
        }, whereabouts  # fmt: skip
    missing = (0, row_length - token_ids_BT.shape[1])
    ids_RL, mask_RL = (nn.functional.pad(each, missing) for each in (token_ids_BT, attention_mask_BT))
    positions_RL = torch.arange(row_length, device=ids_RL.device).expand_as(ids_RL)
    return spread_inputs(model, ranks, ids_RL, positions_RL, mask_RL), whereabouts


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple


def _packed_inputs(
    model: Any, token_ids_BT: Tensor, attention_mask_BT: Tensor, multiple: int, ranks: SequenceRanks | None
) -> tuple[dict[str, Any], Whereabouts]:
    """Rows are a multiple so long."""
    lengths_B = attention_mask_BT.sum(dim=1)
    in_one_row = model.config._attn_implementation == FLASH
    places = lay_out_rows(lengths_B.tolist(), in_one_row=in_one_row, multiple=multiple)
    firsts_B = torch.tensor(places.rows) * places.row_length + torch.tensor(places.starts)
    positions_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    places_BT = (firsts_B.to(token_ids_BT.device).unsqueeze(1) + positions_T).clamp(max=places.num_tokens - 1)
    ids_P, positions_P = token_ids_BT.new_zeros(places.num_tokens), token_ids_BT.new_zeros(places.num_tokens)
    filled_M = places_BT[attention_mask_BT]
    ids_P[filled_M] = token_ids_BT[attention_mask_BT]
    positions_P[filled_M] = positions_T.expand_as(token_ids_BT)[attention_mask_BT]
    ids_RL, positions_RL = (each.view(places.num_rows, places.row_length) for each in (ids_P, positions_P))
    whereabouts = Whereabouts(places_BT, places.row_length, ranks)
    if ranks is not None:
        return spread_inputs(model, ranks, ids_RL, positions_RL, None), whereabouts
    return {"input_ids": ids_RL, "position_ids": positions_RL, "use_cache": False}, whereabouts


def can_pack(body: Any, vocab_size: int, device: torch.device) -> bool:
    """Whether this model keeps trajectories in a row apart: packed, it says of each what it says of it alone."""
    ids_BT, mask_BT = _checked_tokens(vocab_size, device)
    with torch.no_grad():
        packed, padded = (run_body(body, ids_BT, mask_BT, each) for each in (Arrangement(packs=True), PADDED))
    return _are_close(packed.at(mask_BT), padded.at(mask_BT))


def can_spread(body: Any, vocab_size: int, device: torch.device, arrangement: Arrangement) -> bool:
    """Whether this model says of a rank's tokens, spread over several, what it says of them on one; all ranks ask.

    arrangement: with these ranks in it.
    """
    ids_BT, mask_BT = _checked_tokens(vocab_size, device)
    with torch.no_grad():
        spread = run_body(body, ids_BT, mask_BT, arrangement)
        whole = run_body(body, ids_BT, mask_BT, replace(arrangement, ranks=None))
    here_BT = mask_BT & spread.is_here_BT
    return _are_close(spread.at(here_BT), whole.at(here_BT))


def can_share(body: Any, vocab_size: int, device: torch.device) -> bool:
    """Whether this model says of trajectories whose prompt stands once what it says of each alone."""
    ids_BT, mask_BT = _checked_tokens(vocab_size, device, _CHECKED_WITH_PROMPT)
    ids_BT[:-1, :_CHECKED_PROMPT] = ids_BT[0, :_CHECKED_PROMPT]
    with torch.no_grad():
        shared, padded = (run_body(body, ids_BT, mask_BT, each) for each in (Arrangement(shares=True), PADDED))
    return _are_close(shared.at(mask_BT), padded.at(mask_BT))


def _checked_tokens(
    vocab_size: int, device: torch.device, lengths: Sequence[int] = _CHECKED_LENGTHS
) -> tuple[Tensor, Tensor]:
    lengths_B = torch.tensor(lengths, device=device)
    positions_T = torch.arange(int(lengths_B.max()), device=device)
    mask_BT = positions_T < lengths_B.unsqueeze(1)
    return (torch.arange(mask_BT.numel(), device=device).view_as(mask_BT) * 7 + 3) % vocab_size, mask_BT


def _are_close(one_MH: Tensor, other_MH: Tensor) -> bool:
    """Of hidden states; a rank may have none."""
    if one_MH.numel() == 0:
        return True
    tolerance = _TOLERANCE[other_MH.dtype] * float(other_MH.abs().max())
    return float((one_MH - other_MH).abs().max()) <= tolerance
