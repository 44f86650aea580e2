"""Losses, advantages and corrections: pure functions, tensors in, tensors and metrics out.

Adding one is a function and a line in its table. Its keyword-only arguments with defaults are its settings.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from learner.algorithms import advantages, aggregation, corrections, losses
from learner.algorithms.advantages import Estimate
from learner.algorithms.aggregation import BatchCounts
from learner.algorithms.corrections import Correct, Correction
from learner.algorithms.losses import LossOutput, TokenLosses, value_loss
from learner.algorithms.settings import build, describe, parse_call, settings_of
from learner.algorithms.vtrace import vtrace_advantages

LOSSES: dict[str, Callable[..., TokenLosses]] = {
    "cispo": losses.cispo_loss,
    "decoupled_ppo": losses.decoupled_ppo_loss,
    "dppo": losses.dppo_loss,
    "gspo": losses.gspo_loss,
    "m2po": losses.m2po_loss,
    "ppo": losses.ppo_loss,
    "reinforce": losses.reinforce_loss,
    "sapo": losses.sapo_loss,
}
WEIGHTED_LOSSES = frozenset({"decoupled_ppo", "reinforce"})
"""Those that the corrections' weights multiply; the others' own ratios are to the behavior policy."""
WHOLE_BATCH_LOSSES = frozenset({"m2po"})
"""Those that compare all tokens of the batch with each other before the step."""

CORRECTIONS: dict[str, Callable[..., Correction]] = {
    "geometric_mask": corrections.geometric_mask,
    "icepop": corrections.icepop,
    "opsm": corrections.opsm,
    "product_mask": corrections.product_mask,
    "taper": corrections.taper,
    "truncate_sequences": corrections.truncate_sequences,
    "truncate_tokens": corrections.truncate_tokens,
    "unweighted": corrections.unweighted,
    "veto": corrections.veto,
}
WEIGHINGS = frozenset({"taper", "truncate_sequences", "truncate_tokens", "unweighted"})
"""Those that change weights alone, and so nothing about a loss that has none."""

AGGREGATIONS: dict[str, Callable[[Tensor, BatchCounts], Tensor]] = {
    "constant_length": aggregation.constant_length,
    "sequence_mean": aggregation.sequence_mean,
    "token_mean": aggregation.token_mean,
}
ADVANTAGES: dict[str, Callable[..., Estimate]] = {
    "dr_grpo": advantages.unbiased_group_advantages,
    "gae": advantages.generalized_advantages,
    "grpo": advantages.group_relative_advantages,
    "reinforce": advantages.return_advantages,
    "reinforce_plus_plus": advantages.global_advantages,
    "reinforce_plus_plus_baseline": advantages.group_baseline_advantages,
    "rloo": advantages.leave_one_out_advantages,
    "vtrace": vtrace_advantages,
}
OFF_POLICY_ADVANTAGES = frozenset({"vtrace"})
"""Those that ask the policy before the step."""

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "CORRECTIONS",
    "LOSSES",
    "OFF_POLICY_ADVANTAGES",
    "WEIGHINGS",
    "WEIGHTED_LOSSES",
    "WHOLE_BATCH_LOSSES",
    "LossOutput",
    "build_advantages",
    "build_aggregation",
    "build_corrections",
    "build_loss",
    "default_corrections",
    "describe_all",
    "settings_of",
    "value_loss",
]


def build_loss(name: str, settings: Mapping[str, float]) -> Callable[..., TokenLosses]:
    """The loss `name` with its settings filled in; raises ValueError naming what is known."""
    return build("loss", LOSSES, name, settings)


def default_corrections(*, loss: str, max_staleness: int) -> tuple[str, ...]:
    """Bounded weights, where the loss has any: between engines the unbiased ones, between versions those that hold it.

    A step that goes wrong shows in the data only max_staleness steps later. Until then the only thing that leads back
    is praise for what the older policies still do right, which importance weights would make nothing of.
    """
    if loss not in WEIGHTED_LOSSES:
        return ()
    return ("taper",) if max_staleness > 0 else ("truncate_tokens",)


def build_corrections(texts: Sequence[str] | None, *, loss: str, max_staleness: int = 0) -> dict[str, Correct]:
    """The corrections of e.g. ["icepop:low=0.5,high=2", "veto"], in that order; None: default_corrections().

    Raises ValueError for what does not exist, is given twice, or would do nothing about that loss.
    """
    if texts is None:
        texts = default_corrections(loss=loss, max_staleness=max_staleness)
    built: dict[str, Correct] = {}
    for name, settings in map(parse_call, texts):
        if name in built:
            raise ValueError(f"correction {name} is given twice")
        built[name] = build("correction", CORRECTIONS, name, settings)
        if name in WEIGHINGS and loss not in WEIGHTED_LOSSES:
            raise ValueError(
                f"correction {name} changes weights, and loss {loss} has none: its own ratios are to the policy that "
                f"sampled; take a correction that masks, or loss {' or '.join(sorted(WEIGHTED_LOSSES))}"
            )
    return built


def build_aggregation(name: str) -> Callable[[Tensor, BatchCounts], Tensor]:
    """Raises ValueError naming what is known."""
    return build("aggregation", AGGREGATIONS, name, {})


def build_advantages(name: str, settings: Mapping[str, float]) -> Callable[..., Estimate]:
    """The advantage estimator `name` with its settings filled in; raises ValueError naming what is known."""
    return build("advantage", ADVANTAGES, name, settings)


def describe_all() -> str:
    """For --help: everything that can be chosen, with its settings and their defaults."""
    return "\n\n".join(
        [
            describe("losses: --loss NAME, --loss-setting SETTING=NUMBER", LOSSES),
            describe("corrections: --correction NAME[:SETTING=NUMBER,...], several in a row", CORRECTIONS),
            describe("aggregations: --aggregation NAME", AGGREGATIONS),
            describe("advantages: --advantage NAME, --advantage-setting SETTING=NUMBER", ADVANTAGES),
        ]
    )
