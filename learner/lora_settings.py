"""LoraSettings: which low-rank adapters are trained. Light: the configuration is checked before torch is there."""

import math
from pathlib import Path
from typing import Literal

import msgspec

from common.lifecycle import UserError

ALL_LINEAR = "all-linear"

LoraSnapshots = Literal["adapter", "merged"]
"""What servers are given: the adapter, or the whole policy with it added."""


class LoraSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Low-rank adapters, Hu et al. 2021 (arXiv:2106.09685): W x becomes W x + alpha / rank B A x."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...] = ()  # names of linear layers, such as q_proj; (): all but the output layer
    dropout: float = 0.0  # share of A's inputs that are zeroed while a gradient is computed

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.rank}; 0 trains the whole policy")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"lora_alpha must be finite and > 0, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and less than 1, got {self.dropout}")

    def __str__(self) -> str:
        targets = ", ".join(self.target_modules) or ALL_LINEAR
        return f"rank {self.rank}, alpha {self.alpha:g}, {targets}, dropout {self.dropout:g}"


class AdapterDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What the manifest of an adapter says of it, beside its base model."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]


def lora_settings(
    *, rank: int, alpha: float | None, target_modules: tuple[str, ...], dropout: float
) -> LoraSettings | None:
    """From the configuration; None without adapters. Raises ValueError for settings that then mean nothing."""
    if rank == 0:
        if alpha is not None or target_modules or dropout:
            raise ValueError(
                "lora_alpha, lora_target_modules and lora_dropout describe adapters, and lora_rank is 0: set it"
            )
        return None
    alpha = 2.0 * rank if alpha is None else alpha
    return LoraSettings(rank=rank, alpha=alpha, target_modules=target_modules, dropout=dropout)


def write_adapters_note(directory: Path, lora: LoraSettings | None) -> None:
    """Say beside a checkpoint which adapters it holds; without any, nothing is written."""
    if lora is not None:
        _note(directory).write_bytes(msgspec.json.encode(lora))


def check_adapters_note(directory: Path, lora: LoraSettings | None) -> None:
    """Raises UserError unless the checkpoint holds such adapters: others would be left out without a word."""
    path = _note(directory)
    saved = msgspec.json.decode(path.read_bytes(), type=LoraSettings) if path.exists() else None
    if saved != lora:
        raise UserError(
            f"{directory} was written with adapters of {saved or 'none'}, and the settings say {lora or 'none'}: "
            "resume with the same, or begin another run"
        )


def _note(directory: Path) -> Path:
    return directory / "adapters.json"
