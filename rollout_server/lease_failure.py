"""LeaseFailure: why a lease has no group, and the check that keeps what cannot be trained on from becoming one."""

import numpy as np

from common.environments import ENVIRONMENT_UNAVAILABLE
from common.snapshot import NO_VERSION
from rollout_server.environments.environment import MAX_REASON_CHARS
from rollout_server.inference import Completion


class LeaseFailure(Exception):
    """A lease cannot be fulfilled. `kind` is one of FAILURE_KINDS, `reason` is for people."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind = kind
        self.reason = reason[:MAX_REASON_CHARS]


FAILURE_KINDS = {
    "bad_row": "the dataset row has no usable prompt",
    "prompt_too_long": "the prompt leaves no room for a single token",
    "group_too_large": "the group has more bytes than the lease pays for",
    "wrong_environment": "the lease is of another environment than this server runs",
    "environment_error": "the environment raised or died",
    "environment_timeout": "the environment, or the whole episode, took too long",
    ENVIRONMENT_UNAVAILABLE: "the environment could not be reached",
    "masked": "the environment said that the episode must not be trained on",
    "bad_reward": "the environment gave something that is not a plausible number",
    "engine_error": "the engine died or refused the request",
    "bad_sample": "the engine's tokens cannot be trained on: no tokens, no finite log-probability, too old",
}


def check_sample(completion: Completion, min_version: int) -> None:
    """Raises LeaseFailure for tokens that would poison a gradient."""
    num_tokens = completion.token_ids.size
    if num_tokens == 0:
        raise LeaseFailure("bad_sample", "the engine sampled no token")
    if not num_tokens == completion.logprobs.size == completion.token_versions.size:
        sizes = f"{num_tokens} tokens, {completion.logprobs.size} log-probs, {completion.token_versions.size} versions"
        raise LeaseFailure("bad_sample", f"the engine's evidence does not match its tokens: {sizes}")
    if not np.isfinite(completion.logprobs).all():
        raise LeaseFailure("bad_sample", "a sampled token has a log-probability that is not finite")
    oldest = int(completion.token_versions.min())
    if oldest < max(min_version, NO_VERSION + 1):
        raise LeaseFailure("bad_sample", f"a token of version {oldest}, the lease wants at least {min_version}")
