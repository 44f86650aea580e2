"""Aggregations: what share of the loss of the whole batch each token has. B = trajectories, T = tokens (padded).

A loss is the sum over tokens of share times token loss. Shares depend on a token's own trajectory and on counts over
the global batch alone, so the loss depends neither on how the batch is cut into micro-batches nor on how these are
spread over ranks. Tokens that corrections leave out keep their share: it is lost, not passed on to the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchCounts:
    """Of the global batch."""

    tokens: int  # that are trained on
    trajectories: int  # that have one
    max_new_tokens: int  # that a trajectory could have sampled

    def __post_init__(self) -> None:
        if min(self.tokens, self.trajectories, self.max_new_tokens) < 1:
            raise ValueError(f"shares of nothing: {self}")


def token_mean(loss_mask_BT: Tensor, counts: BatchCounts) -> Tensor:
    """The mean over all tokens of the batch: DAPO, arXiv:2503.14476, section 3.3.

    Long trajectories count for more than short ones.
    """
    return loss_mask_BT.double() / counts.tokens


def sequence_mean(loss_mask_BT: Tensor, counts: BatchCounts) -> Tensor:
    """The mean over trajectories of the mean over their tokens: GRPO, arXiv:2402.03300, equation 3.

    Trajectories count alike, so a token of a long one for less.
    """
    tokens_B1 = loss_mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    return loss_mask_BT.double() / (tokens_B1 * counts.trajectories)


def constant_length(loss_mask_BT: Tensor, counts: BatchCounts) -> Tensor:
    """The sum over tokens, over trajectories times the longest completion possible: Dr. GRPO, arXiv:2503.20783.

    Tokens count alike in every batch, so that batches of long answers make larger steps than those of short ones.
    """
    return loss_mask_BT.double() / (counts.trajectories * counts.max_new_tokens)


def aggregate(losses_BT: Tensor, shares_BT: Tensor) -> Tensor:
    """Scalar: the part that a micro-batch has in the loss of the batch."""
    return torch.where(shares_BT > 0, losses_BT * shares_BT.to(losses_BT.dtype), 0.0).sum()
