"""GradientWatch: what must never reach an optimizer is seen where it arises."""

import torch
from torch import Tensor, nn


class GradientWatch:
    """Sees every gradient as it is computed, before an engine reduces, partitions or clips it."""

    def __init__(self, module: nn.Module) -> None:
        self._bad: set[str] = set()
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, name=name: self._look(name, gradient))

    def _look(self, name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient.sum()):
            self._bad.add(name)

    def take_complaint(self) -> str | None:
        """What was not finite since the last call, for people."""
        bad, self._bad = sorted(self._bad), set()
        return f"the gradient of {bad[0]} and {len(bad) - 1} more tensors is not finite" if bad else None
