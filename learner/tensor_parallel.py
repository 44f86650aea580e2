"""Tensor parallelism by DeepSpeed's AutoTP: which layers are split over ranks, and whose part of them this rank has.

Shoeybi et al. 2019 (arXiv:1909.08053). A layer's first product is split by its outputs (dimension 0 of the weight and
its bias), the second by its inputs (dimension 1 of the weight); all else is on every rank.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.lifecycle import UserError
from learner.sharded_state import Shard

_KINDS: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    # On every rank, but computed from split heads: gradients are parts of a sum.
    "replicated_with_grad_allreduce": {"partition_type": "skip", "grad_allreduce": True},
}


class TensorRanks:
    """Ranks with a part of each split layer, and the whole of all else."""

    def __init__(self, group: Any) -> None:
        """group: a process group of torch.distributed that carries what lies on this rank's device."""
        self._group = group
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)

    def __repr__(self) -> str:
        return f"<TensorRanks {self.rank} of {self.size}>"

    def whole(self, tensor: Tensor, shard: Shard) -> Tensor:
        """Of this rank's shard, which all ranks give theirs of."""
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.cat(parts, dim=shard.dim)

    def shards(
        self, parameters: Iterable[tuple[str, Tensor]], whole: Mapping[str, tuple[int, ...]]
    ) -> dict[str, Shard]:
        """Of the parameters that are no longer as they were, when they had the shapes `whole`."""
        found = {}
        for name, parameter in parameters:
            if differing := [dim for dim, size in enumerate(whole[name]) if parameter.shape[dim] != size]:
                [dim] = differing
                found[name] = Shard(dim=dim, index=self.rank, count=self.size, shape=tuple(parameter.shape))
        return found


def partition_config(config: Any) -> dict[str, Any]:
    """AutoTP's, from the plan that transformers has for a model; raises UserError when that has none, or an odd one."""
    specs = [{"patterns": [f"{_pattern(name)}$"], **_KINDS[kind]} for name, kind in _plan(config).items()]
    return {"use_default_specs": False, "layer_specs": specs}


def split_parameters(model: Any) -> int:
    """Elements of the parameters that would be split."""
    patterns = [(re.compile(_pattern(name)), kind) for name, kind in _plan(model.config).items()]
    return sum(parameter.numel() for name, parameter in model.named_parameters() if _is_split(name, patterns))


def _is_split(name: str, patterns: Iterable[tuple[re.Pattern[str], str]]) -> bool:
    layer, _, last = name.rpartition(".")
    kinds = [kind for pattern, kind in patterns if pattern.fullmatch(f"{layer}.weight")]
    return kinds == ["colwise"] or (kinds == ["rowwise"] and last == "weight")


def _plan(config: Any) -> dict[str, str]:
    plan = getattr(config.get_text_config(), "base_model_tp_plan", None)
    if not plan:
        raise UserError(f"--tensor-parallel: transformers has no plan of how to split a {config.model_type}")
    inside = {name: kind for name, kind in plan.items() if name.startswith("layers.")}
    for name, kind in inside.items():
        if kind not in _KINDS:
            raise UserError(f"--tensor-parallel: a {config.model_type} splits {name} {kind}, which is not supported")
    return inside


def _pattern(name: str) -> str:
    return r".*" + re.escape(name).replace(r"\*", r"\d+") + r"\.weight"


def check_sizes(name: str, config: Any, size: int) -> None:
    """Raises UserError unless heads and inner size are multiples of the number of ranks."""
    _plan(config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    sizes = {
        "attention heads": heads,
        "heads for keys and values": getattr(text, "num_key_value_heads", None) or heads,
        "inner size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
    }
    if odd := list(_indivisible(sizes, size)):
        raise UserError(
            f"--tensor-parallel {size}: {name} has {' and '.join(odd)}, which have to be multiples of {size}"
        )


def _indivisible(sizes: Mapping[str, int], size: int) -> Iterator[str]:
    for what, number in sizes.items():
        if number % size:
            yield f"{what}: {number}"
