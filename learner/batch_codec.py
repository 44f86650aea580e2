"""A TrainBatch as bytes, one part for each rank: its micro-batches, and all that is said of the whole batch."""

from dataclasses import fields, replace

import torch
from safetensors.torch import load, save
from torch import Tensor

from learner.training import MicroBatch, TrainBatch

_NUMBERS = ("num_loss_tokens", "num_over_stale_tokens")
_TENSORS = tuple(field.name for field in fields(TrainBatch) if field.name not in (*_NUMBERS, "micro_batches"))
_MICRO_TENSORS = tuple(field.name for field in fields(MicroBatch))


def part_of(batch: TrainBatch, rank: int, num_ranks: int) -> TrainBatch:
    """What one rank trains on; micro-batches are those of rank 0, 1, ... in turn."""
    return replace(batch, micro_batches=batch.micro_batches[rank::num_ranks])


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
