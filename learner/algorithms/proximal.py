"""The proximal policy: the centre of decoupled PPO's trust region. B = trajectories, T = tokens (padded)."""

import torch
from torch import Tensor


def interpolated_logprobs(current_logprobs_BT: Tensor, behavior_logprobs_BT: Tensor, staleness_BT: Tensor) -> Tensor:
    """log pi_prox of the policy one step ago, without asking it: A-3PO, arXiv:2512.06547.

    On the straight line between the log-probabilities of the policy that sampled a token, staleness_BT steps ago, and
    of the current one. Of a token that the current policy itself sampled it is the current policy's: nothing lies one
    step before, and what differs is server and learner, for which weights are there. Carries no grad.
    """
    steps_BT = staleness_BT.clamp(min=1).to(behavior_logprobs_BT.dtype)
    back_BT = (1.0 / steps_BT).masked_fill(staleness_BT < 1, 0.0)
    return torch.lerp(current_logprobs_BT.detach(), behavior_logprobs_BT, back_BT)
