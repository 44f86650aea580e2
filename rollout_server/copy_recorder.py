"""CopyRecorder: learns where a model puts a snapshot's tensors by watching it load them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rollout_server.placements import Placement, nested_strides

aten = torch.ops.aten


class CopyRecorder(TorchDispatchMode):
    """While it is entered, sees every operation that writes into the model's parameters.

    What a model's loader does with a tensor (fuse, cut, pad) is nowhere declared, but all of it comes down to copies
    between strided memory. Where it does not, `placements` says so.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._parameters = {_address(p): (name, p) for name, p in parameters.items() if p.numel()}
        self._tensors: dict[int, str] = {}
        self._copies: list[Placement] = []
        self._constants: list[tuple[str, int, int]] = []  # (parameter, first element, elements)
        self._complaint: str | None = None
        for name, parameter in parameters.items():
            if not parameter.is_contiguous() or parameter.storage_offset():
                self._give_up(f"{name} is not contiguous")
        if len(self._parameters) < sum(1 for p in parameters.values() if p.numel()):
            self._give_up("some parameters share memory")

    def watch(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """The snapshot's tensors by name, for the model to load; they must outlive the recorder."""
        for name, tensor in tensors:
            self._tensors[_address(tensor)] = name
            yield name, tensor

    def placements(self) -> list[Placement]:
        """Every element of every parameter is in exactly one of them, or a constant, whatever the snapshot.

        Raises ValueError, saying what is in the way, where that is not so.
        """
        if self._complaint is not None:
            raise ValueError(self._complaint)
        parts = [(copy.parameter, copy.destination, copy.num_elements) for copy in self._copies]
        for name, parameter in self._parameters.values():
            own = sorted((start, start + count) for owner, start, count in parts + self._constants if owner == name)
            if not _tiles(own, parameter.numel()):
                raise ValueError(f"not every element of {name} was copied once")
        return self._copies

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._local_scalar_dense.default and _address(args[0]) in self._tensors:
            self._give_up(f"the value of {self._tensors[_address(args[0])]} is read, not copied")
        for written in _written(func, args, kwargs or {}):
            if (owner := self._parameters.get(_address(written))) is not None:
                self._note(func, owner[0], written, args)
        return result

    def _note(self, func: Any, parameter: str, written: torch.Tensor, args: Sequence[Any]) -> None:
        if not written.is_contiguous():
            self._give_up(f"{parameter} is written with gaps")
        elif func is aten.copy_.default:
            self._note_copy(parameter, written, args[1])
        elif func in (aten.fill_.Scalar, aten.zero_.default):
            self._constants.append((parameter, written.storage_offset(), written.numel()))
        else:
            self._give_up(f"{parameter} is written by {func}")

    def _note_copy(self, parameter: str, written: torch.Tensor, source: torch.Tensor) -> None:
        tensor = self._tensors.get(_address(source))
        nested = nested_strides(tuple(source.shape), source.stride())
        if tensor is None or nested is None or source.shape != written.shape or source.dtype != written.dtype:
            self._give_up(f"{parameter} is computed from the snapshot, not copied")
            return
        start = source.storage_offset()
        self._copies.append(Placement(tensor, parameter, start, *nested, written.storage_offset()))

    def _give_up(self, complaint: str) -> None:
        self._complaint = self._complaint or complaint


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes into."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else [value] if value is not None else []


def _tiles(parts: Sequence[tuple[int, int]], num_elements: int) -> bool:
    """Sorted [start, end) parts follow on each other from 0 to num_elements."""
    bounds = [(0, 0), *parts, (num_elements, num_elements)]
    return all(end == start for (_, end), (start, _) in pairwise(bounds))
