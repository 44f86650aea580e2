"""Ulysses sequence parallelism: the tokens of every row are spread over ranks, and each rank attends with some heads.

Jacobs et al. 2023 (arXiv:2309.14509). Outside attention a rank computes its own tokens. Around it two exchanges between
the ranks of a sequence turn own tokens with all heads into all tokens with own heads, and back.

It goes through transformers' attention interface: what stands there calls the same attention as before, and only where
a call says how its rows are spread. R = rows, L = tokens of a row, l = those of a rank, A = heads, D = their width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KINDS_OF_ATTENTION = ("sdpa", "flash_attention_2")
"""That compute from queries, keys and values alone, and can be given those of other tokens."""


class SequenceRanks:
    """Ranks that compute the same rows together, each a stretch of their tokens: the first rank the first tokens."""

    def __init__(self, group: Any) -> None:
        """group: a process group of torch.distributed that carries what lies on this rank's device."""
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def __repr__(self) -> str:
        return f"<SequenceRanks {self.rank} of {self.size}>"

    def summed(self, tensor: Tensor) -> Tensor:
        """Over the ranks, which all compute the same loss from it.

        So the gradient of that loss is, on each rank, already the gradient of what the rank gave.
        """
        total: Tensor = _Summed.apply(tensor, self._group)
        return total

    def heads_of_all(self, own_RAlD: Tensor) -> Tensor:
        """[R, A, l, D] -> [R, A / size, L, D]."""
        rows, heads, length, width = own_RAlD.shape
        parts = own_RAlD.view(rows, self.size, heads // self.size, length, width).transpose(0, 1)
        stretches: Tensor = _Exchanged.apply(parts, self._group)  # [size, R, A / size, l, D], by where in a row
        return stretches.permute(1, 2, 0, 3, 4).reshape(rows, heads // self.size, self.size * length, width)

    def tokens_of_all(self, all_RLAD: Tensor) -> Tensor:
        """[R, L, A / size, D] -> [R, l, A, D]."""
        rows, length, heads, width = all_RLAD.shape
        parts = all_RLAD.reshape(rows, self.size, length // self.size, heads, width).transpose(0, 1)
        shares: Tensor = _Exchanged.apply(parts, self._group)  # [size, R, l, A / size, D], by which heads
        return shares.permute(1, 2, 0, 3, 4).reshape(rows, length // self.size, self.size * heads, width)


class _Exchanged(torch.autograd.Function):
    """Part i goes to rank i; at place i of what comes back is what rank i gave this one."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Exchanged.apply(gradients[0], ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        del ctx
        total = tensor.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        del ctx
        return gradients[0], None


@dataclass(frozen=True, slots=True, eq=False)
class SpreadRows:
    """What attention has to know of rows whose tokens lie on several ranks."""

    ranks: SequenceRanks
    position_ids_RL: Tensor
    masks: Tensor | Mapping[str, Tensor | None] | None  # of all tokens; by the kind of layer, where there are several

    def mask_for(self, layer: Any) -> Tensor | None:
        if isinstance(self.masks, Mapping):
            return self.masks[layer.config.layer_types[layer.layer_idx]]
        return self.masks


def spread_inputs(
    model: Any, ranks: SequenceRanks, ids_RL: Tensor, position_ids_RL: Tensor, attention_mask_RL: Tensor | None
) -> dict[str, Any]:
    """Keyword arguments of a transformers model that make it compute this rank's tokens; L is divided by ranks.size.

    attention_mask_RL: None where positions that begin anew keep apart what lies in a row.
    """
    masks = create_masks_for_generate(
        model.config,
        torch.empty((*ids_RL.shape, 0), dtype=model.dtype, device=ids_RL.device),
        attention_mask_RL,
        None,
        position_ids=position_ids_RL,
    )
    own = slice(own_start := ranks.rank * (ids_RL.shape[1] // ranks.size), own_start + ids_RL.shape[1] // ranks.size)
    return {
        "input_ids": ids_RL[:, own],
        "position_ids": position_ids_RL[:, own],
        "use_cache": False,
        "spread": SpreadRows(ranks, position_ids_RL, masks),
    }


def let_rows_be_spread() -> None:
    """Once in a process: what does not say `spread` is computed as ever."""
    for name in KINDS_OF_ATTENTION:
        usual = ALL_ATTENTION_FUNCTIONS[name]
        if not (isinstance(usual, partial) and usual.func is _attention):
            ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, usual))


def _attention(
    usual: Callable[..., Any],
    layer: Any,
    query_RAlD: Tensor,
    key_RAlD: Tensor,
    value_RAlD: Tensor,
    attention_mask: Tensor | None,
    *,
    spread: SpreadRows | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """In place of transformers' own, `usual`; the mask that a model made of its own tokens alone is not looked at."""
    if spread is None:
        output, weights = usual(layer, query_RAlD, key_RAlD, value_RAlD, attention_mask, **kwargs)
        return output, weights
    ranks = spread.ranks
    copies = max(ranks.size // key_RAlD.shape[1], 1)  # of heads of keys that are fewer than ranks
    query = ranks.heads_of_all(query_RAlD)
    key, value = (ranks.heads_of_all(each.repeat_interleave(copies, dim=1)) for each in (key_RAlD, value_RAlD))
    kwargs["position_ids"] = spread.position_ids_RL
    with _queries_of_a_key(layer, query.shape[1] // key.shape[1]):
        output, _ = usual(layer, query, key, value, spread.mask_for(layer), **kwargs)
    return ranks.tokens_of_all(output), None


@contextmanager
def _queries_of_a_key(layer: Any, number: int) -> Iterator[None]:
    """As the layer is to believe while it attends with some of its heads."""
    whole = getattr(layer, "num_key_value_groups", None)
    if whole is None or whole == number:
        yield
        return
    layer.num_key_value_groups = number
    try:
        yield
    finally:
        layer.num_key_value_groups = whole
