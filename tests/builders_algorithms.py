"""Samples for the tests of pure functions: policies that are apart, masks of all kinds, and the same as lists."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learner.algorithms.aggregation import BatchCounts
from learner.algorithms.corrections import Evidence
from learner.algorithms.samples import BatchRatios, Samples, bounded_log_ratio
from tests.oracles.tokens import Token

# Prompt, sampled, environment and padding tokens; one trajectory of one token, one of which nothing is trained.
MASK = torch.tensor(
    [
        [0, 0, 1, 1, 0, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1],
        [0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)


@dataclass(frozen=True)
class Drawn:
    """What the tests draw: every tensor [B, T]."""

    samples: Samples
    staleness_BT: Tensor
    entropy_BT: Tensor

    @property
    def counts(self) -> BatchCounts:
        mask_BT = self.samples.mask_BT
        return BatchCounts(
            tokens=max(int(mask_BT.sum()), 1), trajectories=max(int(mask_BT.any(dim=1).sum()), 1), max_new_tokens=11
        )

    @property
    def evidence(self) -> Evidence:
        samples = self.samples
        return Evidence(
            log_ratio_BT=bounded_log_ratio(samples.proximal_logprobs_BT, samples.behavior_logprobs_BT, samples.mask_BT),
            advantages_BT=samples.masked(samples.advantages_BT),
            mask_BT=samples.mask_BT,
        )

    @property
    def rows(self) -> list[list[Token]]:
        """The tokens in the mask, trajectory by trajectory."""
        samples = self.samples
        columns = {
            "current": samples.current_logprobs_BT, "proximal": samples.proximal_logprobs_BT,
            "behavior": samples.behavior_logprobs_BT, "advantage": samples.advantages_BT,
            "weight": samples.weights_BT, "staleness": self.staleness_BT, "entropy": self.entropy_BT,
        }  # fmt: skip
        return [
            [
                Token(**{name: tensor_BT[b, t].item() for name, tensor_BT in columns.items()})
                for t in mask_T.nonzero().flatten().tolist()
            ]
            for b, mask_T in enumerate(samples.mask_BT)
        ]


def draw(
    spread: float,
    *,
    seed: int = 0,
    mask_BT: Tensor = MASK,
    dtype: torch.dtype = torch.float64,
    one_advantage: bool = False,
) -> Drawn:
    """`spread` is how far the policies are apart: 0.0 is on-policy. one_advantage: the same for a whole trajectory."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(mask_BT.shape, generator=generator, dtype=torch.float64)

    behavior = -noise().abs() - 0.05
    proximal = (behavior + spread * noise()).clamp(max=0.0)
    current = (proximal + spread * noise()).clamp(max=0.0)
    advantages = noise()
    advantages[2] = 0.0  # a group of equal rewards
    if one_advantage:
        advantages = advantages[:, :1].expand_as(advantages).contiguous()
    weights = noise().abs()
    tensors = [tensor.to(dtype) for tensor in (current, proximal, behavior, advantages, weights)]
    current, proximal, behavior, advantages, weights = tensors
    return Drawn(
        Samples(
            current_logprobs_BT=current, proximal_logprobs_BT=proximal, behavior_logprobs_BT=behavior,
            advantages_BT=advantages, weights_BT=weights, mask_BT=mask_BT,
            batch=whole_batch(current, behavior, advantages, mask_BT),
        ),
        staleness_BT=torch.randint(0, 4, mask_BT.shape, generator=generator, dtype=torch.int32),
        entropy_BT=noise().abs().to(dtype),
    )  # fmt: skip


def whole_batch(current_BT: Tensor, behavior_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor) -> BatchRatios:
    return BatchRatios(log_ratios_M=(current_BT - behavior_BT)[mask_BT].detach(), advantages_M=advantages_BT[mask_BT])


def with_current(samples: Samples, current_BT: Tensor) -> Samples:
    """The same, but for what is differentiated; the batch as it was before the step."""
    return replace(samples, current_logprobs_BT=current_BT)


def in_rows(table_BT: Tensor, mask_BT: Tensor) -> list[list[float]]:
    """What stands in the mask, trajectory by trajectory."""
    return [table_BT[b][mask_BT[b]].tolist() for b in range(len(mask_BT))]


def part(samples: Samples, rows: Sequence[int]) -> Samples:
    """Some trajectories of the batch, as a micro-batch of their own; what it knows of the whole stays."""
    chosen = torch.tensor(rows)
    tensors = (
        "current_logprobs_BT",
        "proximal_logprobs_BT",
        "behavior_logprobs_BT",
        "advantages_BT",
        "weights_BT",
        "mask_BT",
    )
    return replace(samples, **{name: getattr(samples, name)[chosen] for name in tensors})
