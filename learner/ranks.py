"""Ranks: the processes that train one policy together, and what they tell each other beside gradients.

Every call is made by all ranks, in the same order. What is told is bytes with a length, never objects of Python.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class RankLostError(RuntimeError):
    """Another rank is gone: the group has to be started anew."""


class Ranks(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast(self, data: bytes = b"") -> bytes:
        """What rank 0 says; what the others give is not looked at."""
        ...

    def scatter(self, parts: Sequence[bytes] = ()) -> bytes:
        """Of what rank 0 gives, the part at this rank's place."""
        ...

    def gather(self, data: bytes) -> list[bytes]:
        """What each says, to all."""
        ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, which give tensors in host memory of one shape."""
        ...

    def saying(self, flag: bool) -> tuple[int, ...]:
        """The ranks whose flag is set."""
        ...


class Alone:
    """The only rank."""

    rank = 0
    size = 1

    def broadcast(self, data: bytes = b"") -> bytes:
        return data

    def scatter(self, parts: Sequence[bytes] = ()) -> bytes:
        [part] = parts
        return part

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def saying(self, flag: bool) -> tuple[int, ...]:
        return (0,) if flag else ()


class GlooRanks:
    """Over TCP, in a process group of its own: torch.distributed has to be initialised.

    A rank whose process died is noticed by the others at their next call; one whose node vanished, after timeout_s.
    """

    def __init__(self, *, timeout_s: float, members: Sequence[Sequence[int]] | None = None) -> None:
        """members: of several such groups beside one another, of which this rank is in one; None: one of all ranks.

        All ranks of all groups call this.
        """
        self._group = new_group(members or [range(dist.get_world_size())], timeout_s=timeout_s, backend="gloo")
        self.rank = dist.get_rank(self._group)
        self.size = dist.get_world_size(self._group)

    def __repr__(self) -> str:
        return f"<GlooRanks {self.rank} of {self.size}>"

    def broadcast(self, data: bytes = b"") -> bytes:
        length = torch.tensor([len(data)])
        dist.broadcast(length, group_src=0, group=self._group)
        content = _tensor(data) if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        if int(length):
            dist.broadcast(content, group_src=0, group=self._group)
        return bytes(content.numpy())

    def scatter(self, parts: Sequence[bytes] = ()) -> bytes:
        if self.rank == 0:
            for other in range(1, self.size):
                dist.send(torch.tensor([len(parts[other])]), group_dst=other, group=self._group)
                dist.send(_tensor(parts[other]), group_dst=other, group=self._group)
            return parts[0]
        length = torch.tensor([0])
        dist.recv(length, group_src=0, group=self._group)
        content = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(content, group_src=0, group=self._group)
        return bytes(content.numpy())

    def gather(self, data: bytes) -> list[bytes]:
        lengths = [torch.tensor([0]) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]), group=self._group)
        longest = max(int(length) for length in lengths)
        if longest == 0:
            return [b""] * self.size
        contents = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
        dist.all_gather(contents, _tensor(data.ljust(longest, b"\0")), group=self._group)
        return [bytes(content.numpy())[: int(length)] for content, length in zip(contents, lengths, strict=True)]

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def saying(self, flag: bool) -> tuple[int, ...]:
        return tuple(rank for rank, said in enumerate(self.gather(bytes([flag]))) if said == b"\1")


def new_group(members: Sequence[Sequence[int]], *, timeout_s: float, backend: str | None = None) -> Any:
    """Of the process groups of these ranks, which all ranks make together, this rank's; backend: None for the usual."""
    timeout = timedelta(seconds=timeout_s)
    made = [dist.new_group(list(each), backend=backend, timeout=timeout) for each in members]
    [own] = [group for each, group in zip(members, made, strict=True) if dist.get_rank() in each]
    return own


def concatenated(ranks: Ranks, tensor_M: Tensor) -> Tensor:
    """All ranks' one-dimensional tensors behind one another, on every rank."""
    parts = ranks.gather(tensor_M.contiguous().numpy().tobytes())
    return torch.cat([torch.frombuffer(bytearray(part), dtype=tensor_M.dtype) for part in parts if part] or [tensor_M])


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
