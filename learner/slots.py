"""Slots: memory that snapshots are written into, shared with the process that serves them, and their layout in it."""

import logging
import mmap
import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.shared_slots import create_slot, lock_to_write, unlock
from common.snapshot import ITEM_BYTES, DType, TensorSpec

logger = logging.getLogger(__name__)

KEPT_S = 2.0  # and as long as KEPT_BYTES_PER_S: who reads a slot for longer keeps it, and another takes its place
KEPT_BYTES_PER_S = 1e9

DTYPE_NAMES: dict[torch.dtype, DType] = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def lay_out(tensors: Iterable[tuple[str, Tensor]]) -> tuple[TensorSpec, ...]:
    """Places of the tensors in a snapshot, without gaps; wide items first, so that every one is aligned."""
    specs: list[TensorSpec] = []
    offset = 0
    kinds = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors]  # they may go one after the other
    for name, dtype, shape in sorted(kinds, key=lambda kind: -kind[1].itemsize):
        if dtype not in DTYPE_NAMES:
            raise ValueError(f"{name} is {dtype}; snapshots hold {', '.join(sorted(ITEM_BYTES))}")
        spec = TensorSpec(name=name, shape=shape, dtype=DTYPE_NAMES[dtype], offset=offset)
        specs.append(spec)
        offset += spec.num_bytes
    return tuple(specs)


class Slots:
    """Shared memory for num_slots snapshots; it vanishes with the processes that map it. See common/shared_slots.py."""

    def __init__(self, slot_bytes: int, num_slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.descriptors = [create_slot(slot_bytes) for _ in range(num_slots)]
        self._mappings = [mmap.mmap(descriptor, slot_bytes) for descriptor in self.descriptors]
        self._kept_since_s: dict[int, float] = {}

    def claim(self, slot: int, now_s: float) -> bool:
        """To write it; False while a server on this host reads it.

        One that stops while it reads keeps that memory, and the slot goes on with new.
        """
        if not lock_to_write(self.descriptors[slot]):
            kept_s = now_s - self._kept_since_s.setdefault(slot, now_s)
            if kept_s < KEPT_S + self.slot_bytes / KEPT_BYTES_PER_S:
                return False
            logger.warning("a rollout server on this host reads a snapshot for %.0f s now: it keeps the memory", kept_s)
            self._replace(slot)
        self._kept_since_s.pop(slot, None)
        return True

    def _replace(self, slot: int) -> None:
        former, self.descriptors[slot] = self.descriptors[slot], create_slot(self.slot_bytes)
        os.close(former)
        self._mappings[slot] = mmap.mmap(self.descriptors[slot], self.slot_bytes)
        lock_to_write(self.descriptors[slot])

    def let_read(self, slot: int) -> None:
        """It is written."""
        unlock(self.descriptors[slot])

    def write(self, slot: int, layout: Sequence[TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copy the tensors to their places: the one copy that publishing costs the training process.

        Each is copied before the next is asked for. Raises KeyError for one that has no place.
        """
        specs = {spec.name: spec for spec in layout}
        memory = torch.frombuffer(self._mappings[slot], dtype=torch.uint8)
        for name, each in tensors:
            spec, tensor = specs[name], each.detach()
            place = memory[spec.offset : spec.offset + spec.num_bytes].view(tensor.dtype).view(tensor.shape)
            place.copy_(tensor)

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)
