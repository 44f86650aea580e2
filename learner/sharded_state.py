"""ShardedState: the trained parameters and Adam's moments as each rank holds them, copied, written and put together.

Each rank writes what it holds, in float32, with a table that says which elements of which parameter that is. Whoever
resumes takes from all files what it needs: at any number of ranks and any ZeRO stage. safetensors only, no pickle.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.lifecycle import UserError

KINDS = ("parameter", "exp_avg", "exp_avg_sq")


class Fragment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive elements of a parameter, and where they lie."""

    name: str
    start: int  # in the flattened parameter
    num_elements: int
    flat: int  # index of the flat tensor
    flat_start: int  # in it


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds."""

    rank: int
    num_ranks: int
    num_steps: int  # of Adam, so far
    fragments: tuple[Fragment, ...]


@dataclass(frozen=True, slots=True)
class Flat:
    """One-dimensional float32 tensors of the same length; the moments are None before the first step."""

    parameter: Tensor
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None


@dataclass(frozen=True, slots=True)
class ShardedState:
    """Of one rank."""

    table: Table
    flats: Sequence[Flat]

    def copy(self) -> "ShardedState":
        """In host memory; nothing that is trained afterwards changes it."""
        return ShardedState(self.table, [_copy(flat) for flat in self.flats])

    def write(self, directory: Path) -> None:
        """One file among those of the other ranks."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{index}.{kind}": tensor
            for index, flat in enumerate(self.flats)
            for kind in KINDS
            if (tensor := getattr(flat, kind)) is not None
        }
        metadata = {"table": msgspec.json.encode(self.table).decode()}
        save_file(tensors, directory / f"rank-{self.table.rank:05d}.safetensors", metadata=metadata)


def _copy(flat: Flat) -> Flat:
    copies = [
        None if tensor is None else torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())
        for tensor in (flat.parameter, flat.exp_avg, flat.exp_avg_sq)
    ]
    return Flat(copies[0], copies[1], copies[2])


class SavedState:
    """What all ranks of a run wrote into one directory. Raises UserError when a file is missing or cannot be read."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        paths = sorted(directory.glob("rank-*.safetensors"))
        if not paths:
            raise UserError(f"{directory} holds no checkpoint; was the run begun with another advantage?")
        try:
            self._files: list[Any] = [safe_open(path, framework="pt") for path in paths]
            tables = [msgspec.json.decode(file.metadata()["table"], type=Table) for file in self._files]
        except (OSError, KeyError, TypeError, msgspec.MsgspecError, SafetensorError) as error:
            raise UserError(f"the checkpoint {directory} cannot be read: {error}") from error
        if [table.rank for table in tables] != list(range(tables[0].num_ranks)):
            raise UserError(
                f"the checkpoint {directory} was written by {tables[0].num_ranks} ranks and has {len(paths)}"
            )
        self.num_steps = tables[0].num_steps
        self._pieces: dict[str, list[tuple[Fragment, Any]]] = {}
        for table, file in zip(tables, self._files, strict=True):
            for fragment in table.fragments:
                self._pieces.setdefault(fragment.name, []).append((fragment, file))

    def check_names(self, names: Iterable[str]) -> None:
        """Raises UserError unless it holds exactly these parameters."""
        expected, held = set(names), set(self._pieces)
        if expected != held:
            odd = sorted(expected ^ held)
            raise UserError(
                f"the checkpoint {self._directory} holds {len(held)} parameters, the model trains {len(expected)}; "
                f"{odd[0]} is in one of them only: resume with the model the run was begun with"
            )

    def read(self, name: str, start: int, num_elements: int, kind: str = "parameter") -> Tensor:
        """These elements of a parameter or a moment of it, float32 [num_elements]; zeros before the first step."""
        values = torch.zeros(num_elements)
        if kind != "parameter" and self.num_steps == 0:
            return values
        end, found = start + num_elements, 0
        for fragment, file in self._pieces[name]:
            first, last = max(start, fragment.start), min(end, fragment.start + fragment.num_elements)
            if first >= last:
                continue
            offset = fragment.flat_start + first - fragment.start
            piece = file.get_slice(f"{fragment.flat}.{kind}")[offset : offset + last - first]
            values[first - start : last - start] = piece
            found += last - first
        if found != num_elements:
            raise UserError(f"the checkpoint {self._directory} holds {found} of {num_elements} elements of {name}")
        return values
