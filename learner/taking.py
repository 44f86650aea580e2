"""Taking rows of a tensor, some of them several times, with gradients that add up well."""

from typing import Any

import torch
from torch import Tensor


def take(tensor_L: Tensor, places: Tensor) -> Tensor:
    """tensor_L[places], whatever dimensions either has.

    The gradient of a row that is taken several times is summed in float32 at least, and in the same order every time.
    """
    taken: Tensor = _Taken.apply(tensor_L, places)
    return taken


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor_L: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = tensor_L.shape
        return tensor_L[places]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [places], [gradient] = ctx.saved_tensors, gradients
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total_L = gradient.new_zeros(ctx.shape, dtype=wide)
        total_L.index_put_((places,), gradient.to(wide), accumulate=True)
        return total_L.to(gradient.dtype), None
