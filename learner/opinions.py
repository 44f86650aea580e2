"""Opinions: what the networks, as they are before a step, say of the batch it is to train on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.kl_control import KlControl
from learner.reference import Reference
from learner.training import MicroBatch, TrainBatch

Forward = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinions:
    """One tensor per micro-batch, float32 in host memory; None where nobody was asked.

    S = T + 1: the value of the state before each token, and of the one after the last.
    """

    values_BS: Sequence[Tensor] | None = None
    logprobs_BT: Sequence[Tensor] | None = None  # of the policy
    reference_logprobs_BT: Sequence[Tensor] | None = None
    token_rewards_BT: Sequence[Tensor] | None = None  # such as -beta KL; 0 where no token is trained


def ask_networks(
    batch: TrainBatch,
    *,
    policy: Forward,
    critic: Forward | None,
    reference: Reference | None,
    kl: KlControl,
    asks_policy: bool = False,
) -> Opinions:
    """The policy costs a forward pass of its own only where it is asked for, or the KL is in the reward.

    There it is the policy as it is now that is compared, not the older ones that sampled some of the tokens.
    """
    micro_batches = batch.micro_batches
    references = reference.logprobs(micro_batches) if reference is not None else None
    with torch.no_grad():
        values = [_values(critic, micro) for micro in micro_batches] if critic is not None else None
        is_in_reward = references is not None and kl.is_in_reward
        logprobs = [_logprobs(policy, micro) for micro in micro_batches] if asks_policy or is_in_reward else None
    token_rewards: list[Tensor] | None = None
    if references is not None and logprobs is not None and is_in_reward:
        token_rewards = [
            kl.token_rewards(own_BT, reference_BT, micro.loss_mask_BT)
            for micro, own_BT, reference_BT in zip(micro_batches, logprobs, references, strict=True)
        ]
    return Opinions(
        values_BS=values, logprobs_BT=logprobs, reference_logprobs_BT=references, token_rewards_BT=token_rewards
    )


def _logprobs(policy: Forward, micro: MicroBatch) -> Tensor:
    logprobs_BT, *_ = policy(micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
    return logprobs_BT.cpu()


def _values(critic: Forward, micro: MicroBatch) -> Tensor:
    """[B, T + 1]: with one more place, which nothing fills, the state after the last token has a value too."""
    [values_BS] = critic(
        nn.functional.pad(micro.token_ids_BT, (0, 1)), nn.functional.pad(micro.attention_mask_BT, (0, 1))
    )
    return values_BS.cpu()
