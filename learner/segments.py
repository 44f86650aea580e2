"""Segments: a row of tokens in which a prompt stands once, and behind it the answers to it, one after the other.

Outside attention every token of the row is computed once, without padding. Around attention the row is taken apart:
queries of a segment attend to the keys of its prompt and its own. It goes through transformers' attention interface:
what stands there calls the same attention as before, and only where a call says of which segments its row is.
L = tokens of the row, A = heads, D = their width, S = segments of a call, q, k = queries and keys of each, padded.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from learner.shared_prompts import find_units, saves_enough
from learner.taking import take

KIND_OF_ATTENTION: Final = "sdpa"
_SHORT = 32  # tokens; segments that are not longer are computed together, whatever is padded


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that see each other, and what precedes them elsewhere in the row. Without a prefix prefix_start is 0."""

    start: int
    length: int
    prefix_start: int = 0
    prefix: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """Segments of like size, that attend at once."""

    queries_Sq: Tensor  # int64, places in the row
    keys_Sk: Tensor  # likewise
    sees: Tensor | None  # bool [S or 1, 1, q, k]; None: causal


@dataclass(frozen=True, slots=True, eq=False)
class SegmentedRow:
    """What attention has to know of a row of segments."""

    calls: Sequence[AttentionCall]
    slots_L: Tensor  # int64: where each token's output is in those of all calls


@dataclass(frozen=True, slots=True)
class Layout:
    """Where trajectories are in the row: each with its first `prefixes` tokens at one place, the rest at another."""

    segments: Sequence[Segment]
    prefixes: Sequence[int]
    prefix_starts: Sequence[int]
    own_starts: Sequence[int]
    num_tokens: int


def lay_out_segments(token_ids: Sequence[Any]) -> Layout:
    """token_ids: [T] of each trajectory."""
    segments, prefixes, prefix_starts, own_starts = list[Segment](), list[int](), list[int](), list[int]()
    end = 0
    for unit in find_units(token_ids):
        start, end = end, end + unit.prefix
        if unit.prefix:
            segments.append(Segment(start, unit.prefix))
        for index in range(unit.first, unit.first + unit.count):
            length = len(token_ids[index]) - unit.prefix
            if length:
                segments.append(Segment(end, length, start if unit.prefix else 0, unit.prefix))
            prefixes.append(unit.prefix)
            prefix_starts.append(start)
            own_starts.append(end)
            end += length
    return Layout(segments, prefixes, prefix_starts, own_starts, end)


def segmented_inputs(token_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[dict[str, Any], Tensor] | None:
    """(keyword arguments of a transformers model, places_BT in the one row that it is given).

    None where that would be no faster than trajectories beside one another.
    """
    device = token_ids_BT.device
    lengths_B = attention_mask_BT.sum(dim=1).tolist()
    ids_BT = token_ids_BT.cpu().numpy()
    layout = lay_out_segments([ids_T[:length] for ids_T, length in zip(ids_BT, lengths_B, strict=True)])
    if not saves_enough(layout.num_tokens, token_ids_BT.numel()):
        return None
    prefixes_B1, prefix_starts_B1, own_starts_B1 = (
        torch.tensor(each, device=device).unsqueeze(1)
        for each in (layout.prefixes, layout.prefix_starts, layout.own_starts)
    )
    positions_T = torch.arange(token_ids_BT.shape[1], device=device)
    places_BT = torch.where(
        positions_T < prefixes_B1, prefix_starts_B1 + positions_T, own_starts_B1 + positions_T - prefixes_B1
    ).clamp(max=layout.num_tokens - 1)
    ids_1L, positions_1L = (token_ids_BT.new_zeros(1, layout.num_tokens) for _ in range(2))
    filled_M = places_BT[attention_mask_BT]
    ids_1L[0, filled_M] = token_ids_BT[attention_mask_BT]
    positions_1L[0, filled_M] = positions_T.expand_as(token_ids_BT)[attention_mask_BT]
    inputs = {
        "input_ids": ids_1L,
        "position_ids": positions_1L,
        # A model makes no mask of its own, as large as the row's length squared, where it is given one of four sides.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "use_cache": False,
        "segmented": segmented_row(layout, device),
    }
    return inputs, places_BT


def segmented_row(layout: Layout, device: torch.device) -> SegmentedRow:
    """How attention is to take the row apart."""
    alike: dict[Hashable, list[Segment]] = defaultdict(list)
    for segment in layout.segments:
        alike[_size_class(segment)].append(segment)
    slots_L = torch.empty(layout.num_tokens, dtype=torch.int64)
    calls, num_slots = [], 0
    for segments in alike.values():
        call = _call(segments)
        real_Sq = torch.arange(call.queries_Sq.shape[1]) < torch.tensor([[each.length] for each in segments])
        slots_L[call.queries_Sq[real_Sq]] = num_slots + real_Sq.flatten().nonzero().squeeze(1)
        num_slots += real_Sq.numel()
        calls.append(
            AttentionCall(
                call.queries_Sq.to(device),
                call.keys_Sk.to(device),
                call.sees.to(device) if call.sees is not None else None,
            )
        )
    return SegmentedRow(calls, slots_L.to(device))


def _size_class(segment: Segment) -> Hashable:
    """Of segments that are computed together. Masks of long ones are alike, so that there is one for all of them."""
    step = (max(segment.length, _SHORT) ** 2).bit_length()  # two of them to a doubling of the length
    is_short = max(segment.length, segment.prefix) <= 2 * _SHORT
    return step, bool(segment.prefix) if is_short else segment.prefix


def _call(segments: Sequence[Segment]) -> AttentionCall:
    starts, lengths, prefix_starts, prefixes = (
        torch.tensor([getattr(each, name) for each in segments]).unsqueeze(1)
        for name in ("start", "length", "prefix_start", "prefix")
    )
    own_q, before_p = torch.arange(int(lengths.max())), torch.arange(int(prefixes.max()))
    queries_Sq = starts + torch.minimum(own_q, lengths - 1)
    if len(before_p) == 0:
        return AttentionCall(queries_Sq, queries_Sq, None)
    keys_Sk = torch.cat([prefix_starts + torch.minimum(before_p, prefixes - 1), queries_Sq], dim=1)
    in_prefix_Sp = before_p < (prefixes if bool((prefixes != prefixes[0]).any()) else prefixes[:1])
    causal_qq = own_q.unsqueeze(1) >= own_q
    sees_Sqk = torch.cat(
        [
            in_prefix_Sp.unsqueeze(1).expand(-1, len(own_q), -1),
            causal_qq.expand(len(in_prefix_Sp), -1, -1),
        ],
        dim=2,
    )
    return AttentionCall(queries_Sq, keys_Sk, sees_Sqk.unsqueeze(1))


@cache
def let_rows_be_segmented() -> None:
    """Once in a process: what does not say `segmented` is computed as ever."""
    ALL_ATTENTION_FUNCTIONS.register(KIND_OF_ATTENTION, partial(_attention, ALL_ATTENTION_FUNCTIONS[KIND_OF_ATTENTION]))


def _attention(
    usual: Callable[..., Any],
    layer: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segmented: SegmentedRow | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """In place of transformers' own, `usual`; query, key, value [1, A, L, D] -> [1, L, A, D].

    Where a model has put something of its own into the mask, or sees a window, that is left to it: what it then says is
    found out at the start, see can_share().
    """
    has_its_own = (attention_mask is not None and attention_mask.numel() > 1) or kwargs.get("sliding_window")
    if segmented is None or has_its_own:
        output, weights = usual(layer, query, key, value, attention_mask, **kwargs)
        return output, weights

    def said() -> Iterator[Tensor]:
        for call in segmented.calls:
            query_SAqD, key_SAkD, value_SAkD = (
                take(tensor_1ALD[0].transpose(0, 1), places_Sn).transpose(1, 2)
                for tensor_1ALD, places_Sn in (
                    (query, call.queries_Sq), (key, call.keys_Sk), (value, call.keys_Sk)
                )
            )  # fmt: skip
            output_SqAD, _ = usual(layer, query_SAqD, key_SAkD, value_SAkD, call.sees, **kwargs)
            yield output_SqAD.flatten(0, 1)

    return take(torch.cat(list(said())), segmented.slots_L).unsqueeze(0), None
