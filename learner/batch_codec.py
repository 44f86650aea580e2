"""A TrainBatch as bytes, a part for each rank or for several: its micro-batches, and what is said of the batch."""

from dataclasses import fields, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from learner.training import BatchLayout, MicroBatch, TrainBatch

_NUMBERS = ("num_loss_tokens", "num_over_stale_tokens")
_TENSORS = tuple(field.name for field in fields(TrainBatch) if field.name not in (*_NUMBERS, "micro_batches"))
_MICRO_TENSORS = tuple(field.name for field in fields(MicroBatch))


def part_of(batch: TrainBatch, rank: int, layout: BatchLayout) -> TrainBatch:
    """What one rank trains on; micro-batches are those of part 0, 1, ... in turn, parts those of consecutive ranks."""
    part = rank // layout.ranks_per_part
    return replace(batch, micro_batches=batch.micro_batches[part :: layout.num_parts])


def encode_batch(batch: TrainBatch) -> bytes:
    tensors: dict[str, Tensor] = {name: getattr(batch, name) for name in _TENSORS}
    tensors |= {name: torch.tensor(getattr(batch, name)) for name in _NUMBERS}
    for index, micro in enumerate(batch.micro_batches):
        tensors |= {f"{index}.{name}": getattr(micro, name).contiguous() for name in _MICRO_TENSORS}
    return bytes(save(tensors))


def decode_batch(data: bytes) -> TrainBatch:
    tensors = load(data)
    num_micro_batches = sum(name.endswith(f".{_MICRO_TENSORS[0]}") for name in tensors)
    return TrainBatch(
        micro_batches=[
            MicroBatch(**{name: tensors[f"{index}.{name}"] for name in _MICRO_TENSORS})
            for index in range(num_micro_batches)
        ],
        **{name: tensors[name] for name in _TENSORS},
        **{name: int(tensors[name]) for name in _NUMBERS},
    )
