"""GradientWatch: what must never reach an optimizer is seen where it arises."""

import torch
from torch import Tensor, nn

MAX_NORM = 1e10
"""Of one tensor's gradient. What is larger is an error, too, and in a sum of squares it would soon be infinite: then
clipping would multiply all by 0, or by nan, and some of the networks of a step might have been updated already."""


class GradientWatch:
    """Sees every gradient as it is computed, before an engine reduces, partitions or clips it."""

    def __init__(self, module: nn.Module) -> None:
        self._bad: set[str] = set()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: self._look(name, gradient))

    def _look(self, name: str, gradient: Tensor) -> None:
        if not torch.linalg.vector_norm(gradient, dtype=torch.float32) <= MAX_NORM:  # nan compares as False
            self._bad.add(name)

    def take_complaint(self) -> str | None:
        """What was not finite since the last call, for people."""
        bad, self._bad = sorted(self._bad), set()
        if not bad:
            return None
        return f"the gradient of {bad[0]} and {len(bad) - 1} more tensors is not finite, or larger than {MAX_NORM:g}"
