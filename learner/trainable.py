"""Trainable: a network together with its optimizer, as PpoEngine sees it, whatever engine it runs on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from learner.sharded_state import ShardedState


class Trainable(Protocol):
    """A network together with its optimizer."""

    @property
    def module(self) -> nn.Module: ...

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The network's outputs; inputs may lie on any device."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Adds to the gradient; `is_last` says that the next call is step()."""
        ...

    def step(self, learning_rate: float) -> float:
        """Clips, updates, clears the gradient; returns its norm before clipping."""
        ...

    def discard_gradient(self) -> None:
        """Forget what backward() added since the last step."""
        ...

    def gathered(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Named parameters, whole, one after the other; each is to be copied before the next is asked for."""
        ...

    def copy_state(self) -> ShardedState:
        """A copy of the parameters and of the optimizer's state, as far as this rank holds them."""
        ...

    def load(self, directory: Path) -> None:
        """Continue from what all ranks wrote there; raises UserError when it does not fit."""
        ...
