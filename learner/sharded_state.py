"""ShardedState: the trained parameters and Adam's moments as each rank holds them, copied, written and put together.

Each rank writes what it holds, in float32, with a table that says which elements of which parameter that is. Whoever
resumes takes from all files what it needs: at any number of ranks and any ZeRO stage. safetensors only, no pickle.
"""

import math
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


class Shard(msgspec.Struct, frozen=True, array_like=True):
    """Which part of a parameter is one that several ranks have a part of each, of the same size."""

    dim: int
    index: int
    count: int
    shape: tuple[int, ...]  # of the part

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return tuple(size * self.count if dim == self.dim else size for dim, size in enumerate(self.shape))

    def cut(self, whole: Tensor) -> Tensor:
        size = self.shape[self.dim]
        return whole.view(self.whole_shape).narrow(self.dim, self.index * size, size)


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds."""

    rank: int
    num_ranks: int
    num_steps: int  # of Adam, so far
    fragments: tuple[Fragment, ...]
    shards: dict[str, Shard] = {}  # of parameters that this rank has a part of; fragments are then of that part


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
        self._pieces: dict[tuple[str, int], list[tuple[Fragment, Any]]] = {}
        self._shards: dict[str, Shard] = {}  # one of each parameter that is in parts
        for table, file in zip(tables, self._files, strict=True):
            self._shards |= table.shards
            for fragment in table.fragments:
                shard = table.shards.get(fragment.name)
                key = fragment.name, shard.index if shard is not None else 0
                self._pieces.setdefault(key, []).append((fragment, file))

    def check_names(self, names: Iterable[str]) -> None:
        """Raises UserError unless it holds exactly these parameters."""
        expected, held = set(names), {name for name, _ in self._pieces}
        if expected != held:
            odd = sorted(expected ^ held)
            raise UserError(
                f"the checkpoint {self._directory} holds {len(held)} parameters, the model trains {len(expected)}; "
                f"{odd[0]} is in one of them only: resume with the model the run was begun with"
            )

    def read(
        self, name: str, start: int, num_elements: int, kind: str = "parameter", *, shard: Shard | None = None
    ) -> Tensor:
        """These elements of a parameter or a moment of it, float32 [num_elements]; zeros before the first step.

        shard: of which they are; None: of the whole.
        """
        if kind != "parameter" and self.num_steps == 0:
            return torch.zeros(num_elements)
        saved = self._shards.get(name)
        if (saved and (saved.dim, saved.count)) == (shard and (shard.dim, shard.count)):
            return self._read_part(name, shard.index if shard is not None else 0, start, num_elements, kind)
        whole = self._whole(name, kind, saved or shard)
        own = whole if shard is None else shard.cut(whole)
        return own.reshape(-1)[start : start + num_elements]

    def _whole(self, name: str, kind: str, shard: Shard | None) -> Tensor:
        """shard: any of it, as it was saved, or as it is asked for where it was saved whole."""
        assert shard is not None
        if name not in self._shards:
            return self._read_part(name, 0, 0, math.prod(shard.whole_shape), kind)
        size = math.prod(shard.shape)
        parts = [self._read_part(name, index, 0, size, kind).view(shard.shape) for index in range(shard.count)]
        return torch.cat(parts, dim=shard.dim)

    def _read_part(self, name: str, part: int, start: int, num_elements: int, kind: str) -> Tensor:
        values = torch.zeros(num_elements)
        end, found = start + num_elements, 0
        for fragment, file in self._pieces[name, part]:
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
