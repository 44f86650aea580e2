"""What each step reports, by name: in the events, at the trackers, and to Prometheus as gauges `step_NAME`.

With r = pi / mu of a token, pi the policy before the step and mu the one that sampled it. All are of the whole batch,
however it is cut into micro-batches: see learner/algorithms/metrics.py.
"""

from collections.abc import Iterator, Mapping

from common.metrics import Measurement
from common.trajectory import Group
from learner.algorithms import CORRECTIONS, WEIGHINGS
from learner.refusals import Refusals
from learner.training import StepResult

STEP_METRICS: Mapping[str, str] = {
    "reward": "mean over trajectories, as environments gave it",
    "reward_std": "standard deviation of it",
    "shaped_reward": "mean after the penalty for length, normalisation and clipping",
    "equal_reward_groups": "share of the groups of equal rewards: relative to the group they teach nothing",
    "length_mean": "sampled tokens of a trajectory",
    "length_min": "of the shortest",
    "length_max": "of the longest",
    "truncated": "share of the trajectories that were cut off",
    "trained_tokens": "tokens with a gradient",
    "over_stale_tokens": "sampled tokens that were too old to be trained",
    "dropped_tokens": "tokens of trajectories that were left out, of equal groups or truncated",
    "refused": "1 for a step that was not taken, because a loss or gradient was not finite",
    "staleness_mean": "optimizer steps since a trained token was sampled",
    "staleness_min": "of the youngest",
    "staleness_max": "of the oldest",
    "advantage_mean": "over trained tokens",
    "advantage_std": "standard deviation; 0 says that there is nothing to learn from",
    "advantage_min": "the smallest",
    "advantage_max": "the largest",
    "mismatch_k1": "mean of -log r over tokens of staleness 0: server against learner, 0 but for rounding",
    "mismatch_k3": "mean of r - 1 - log r over the same tokens",
    "mismatch_abs": "mean of |log r| over the same tokens",
    "staleness_k1": "mean of -log r over older tokens: how far the policy moved since",
    "staleness_k3": "mean of r - 1 - log r over older tokens",
    "effective_sample_share": "Kish's effective sample size of the weights r, over the number of tokens",
    "ratio_mean": "of r; 1 in expectation",
    "ratio_min": "the smallest",
    "ratio_max": "the largest",
    "weight_mean": "importance weight after corrections, 0 where a token is left out",
    "weight_max": "the largest",
    "weight_effective_share": "Kish's effective sample size of them, over the number of tokens",
    "masked_fraction": "share of the tokens that corrections left out, all of them together",
    "clip_fraction": "share of the tokens whose gradient the loss clipped away",
    "entropy": "nats per token of the distribution it was sampled from",
    "loss": "what is differentiated: of the policy, with entropy bonus, KL and a value head's part",
    "policy_loss": "the policy's own part in it",
    "entropy_loss": "the entropy bonus in it",
    "kl_loss": "the cost of the distance to the reference in it, per token",
    "reference_kl_k1": "nats per token from the reference, as log(pi / reference)",
    "reference_kl_k3": "nats per token from the reference, by the estimate that is never negative",
    "reference_kl_per_trajectory": "nats per trajectory from the reference, which kl_target is compared with",
    "kl_coefficient": "cost of one nat at this step",
    "grad_norm": "of the policy's gradient, before clipping",
    "learning_rate": "of the policy",
    "critic_grad_norm": "of the critic's gradient, before clipping",
    "value_loss": "of the critic, half the clipped squared error",
    "value_error_squared": "mean squared error of the critic before the step",
    "value_clip_fraction": "share of the tokens whose value moved too far in the step",
    "explained_variance": "share of the returns' variance that the critic knew; negative: worse than a constant",
    **{
        f"{name}_masked": f"share of the tokens that {name} left out" for name in sorted(CORRECTIONS.keys() - WEIGHINGS)
    },
    **{
        f"{name}_truncated": f"share of the tokens whose weight {name} truncated"
        for name in sorted(WEIGHINGS - {"unweighted"})
    },
}


class StepMeter:
    """The newest step, for the Prometheus endpoint: read from another thread, and so one assignment."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._newest: Mapping[str, float] = {}

    def step_completed(self, version: int, groups: tuple[Group, ...], result: StepResult) -> None:
        del version, groups
        self._newest = dict(result.metrics)

    def measure(self) -> Iterator[Measurement]:
        skipped = self._refusals.skipped_steps
        yield Measurement(name="steps_skipped_total", value=skipped, help="batches that were not finite, and set aside")
        for name, value in self._newest.items():
            yield Measurement(name=f"step_{name}", value=value, help=STEP_METRICS[name])
