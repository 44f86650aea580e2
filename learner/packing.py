"""Packing: several trajectories behind one another in a row, so that the network computes next to no padding.

Positions begin anew with each trajectory, and that is what keeps them apart: transformers makes a block-diagonal mask
of them, or variable-length calls of flash attention. Only so: with an attention mask, or a cache, the rows would
silently be read as one long text each. B = trajectories, T = tokens (padded), R = rows, L = tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

FLASH: Final = "flash_attention_2"
_CHECKED_LENGTHS = (5, 3, 2)
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


def lay_out_rows(lengths: Sequence[int], *, in_one_row: bool = False) -> Places:
    """First fit, the longest first, into rows as long as the longest trajectory.

    So attention over whole rows costs no more than over padded trajectories. in_one_row: for attention that costs
    nothing between trajectories.
    """
    row_length = sum(lengths) if in_one_row else max(lengths)
    rows, starts, filled = [0] * len(lengths), [0] * len(lengths), list[int]()
    for index in sorted(range(len(lengths)), key=lambda each: (-lengths[each], each)):
        row = next((row for row, used in enumerate(filled) if used + lengths[index] <= row_length), len(filled))
        if row == len(filled):
            filled.append(0)
        rows[index], starts[index] = row, filled[row]
        filled[row] += lengths[index]
    return Places(rows, starts, len(filled), row_length)


class HiddenStates:
    """What a model's body says of a micro-batch, to be asked for by the places of tokens in it."""

    def __init__(self, hidden_PH: Tensor, places_BT: Tensor) -> None:
        self.flat_PH = hidden_PH  # P = R * L, all places of all rows
        self.places_BT = places_BT  # int64 in P; anything outside the attention mask

    def before(self, predicted_BT: Tensor) -> Tensor:
        """[N, H]: of the tokens that stand before those in predicted_BT, whose first column is left out."""
        return self.flat_PH[self.places_BT[:, :-1][predicted_BT]]


def run_body(body: Any, token_ids_BT: Tensor, attention_mask_BT: Tensor, *, packs: bool) -> HiddenStates:
    """The last hidden states of a transformers model without its output layer."""
    inputs, places_BT = body_inputs(body, token_ids_BT, attention_mask_BT, packs=packs)
    return HiddenStates(body(**inputs).last_hidden_state.flatten(0, 1), places_BT)


def body_inputs(
    model: Any, token_ids_BT: Tensor, attention_mask_BT: Tensor, *, packs: bool
) -> tuple[dict[str, Any], Tensor]:
    """(keyword arguments of a transformers model, places_BT of the tokens in what it returns)."""
    if not packs:
        places_BT = torch.arange(token_ids_BT.numel(), device=token_ids_BT.device).view_as(token_ids_BT)
        return {
            "input_ids": token_ids_BT, "attention_mask": attention_mask_BT.long(), "use_cache": False,
        }, places_BT  # fmt: skip
    lengths_B = attention_mask_BT.sum(dim=1)
    places = lay_out_rows(lengths_B.tolist(), in_one_row=model.config._attn_implementation == FLASH)
    firsts_B = torch.tensor(places.rows) * places.row_length + torch.tensor(places.starts)
    positions_T = torch.arange(token_ids_BT.shape[1], device=token_ids_BT.device)
    places_BT = (firsts_B.to(token_ids_BT.device).unsqueeze(1) + positions_T).clamp(max=places.num_tokens - 1)
    ids_P, positions_P = token_ids_BT.new_zeros(places.num_tokens), token_ids_BT.new_zeros(places.num_tokens)
    filled_M = places_BT[attention_mask_BT]
    ids_P[filled_M] = token_ids_BT[attention_mask_BT]
    positions_P[filled_M] = positions_T.expand_as(token_ids_BT)[attention_mask_BT]
    shape = (places.num_rows, places.row_length)
    return {
        "input_ids": ids_P.view(shape), "position_ids": positions_P.view(shape), "use_cache": False,
    }, places_BT  # fmt: skip


def can_pack(body: Any, vocab_size: int, device: torch.device) -> bool:
    """Whether this model keeps trajectories in a row apart: packed, it says of each what it says of it alone."""
    lengths_B = torch.tensor(_CHECKED_LENGTHS, device=device)
    positions_T = torch.arange(int(lengths_B.max()), device=device)
    mask_BT = positions_T < lengths_B.unsqueeze(1)
    ids_BT = (torch.arange(mask_BT.numel(), device=device).view_as(mask_BT) * 7 + 3) % vocab_size
    with torch.no_grad():
        packed, padded = (run_body(body, ids_BT, mask_BT, packs=packs) for packs in (True, False))
    packed_MH, padded_MH = packed.flat_PH[packed.places_BT[mask_BT]], padded.flat_PH[padded.places_BT[mask_BT]]
    tolerance = _TOLERANCE[padded_MH.dtype] * float(padded_MH.abs().max())
    return float((packed_MH - padded_MH).abs().max()) <= tolerance
