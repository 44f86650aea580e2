"""Canary: what the learner itself says of a fixed prompt, for an engine that loaded the same version to be held to.

Digests prove which bytes arrived. Only log-probabilities prove which bytes are computed with: an engine may keep a
stale copy of a tensor, or skip one, and go on without an error.
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

NUM_TOKENS = 64
MAX_TOKENS = 1 << 12
SEED = 0

TOLERANCES = {"float32": 2e-4, "bfloat16": 0.25, "float16": 0.05}
"""By the type of the weights: mean difference, in nats per token, that two right implementations stay far below.

For float32 50 times, for bfloat16 5 times the largest that `make bench-canary` measured, see docs/weights.md.
"""


class Canary(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Log-probabilities of tokens 1..T-1 of a prompt of T tokens, each given those before, at temperature 1."""

    token_ids: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], ...], Meta(min_length=2, max_length=MAX_TOKENS)
    ]  # [T]
    logprobs: Annotated[
        tuple[Annotated[float, Meta(ge=-1e9, le=0.0)], ...], Meta(min_length=1, max_length=MAX_TOKENS)
    ]  # [T-1]
    tolerance: Annotated[float, Meta(gt=0.0, le=1e9)]  # nats per token

    @property
    def is_whole(self) -> bool:
        return len(self.logprobs) == len(self.token_ids) - 1

    def token_array(self) -> npt.NDArray[np.int32]:
        return np.array(self.token_ids, np.int32)

    def distance(self, logprobs: npt.NDArray[np.float32]) -> float:
        """Mean absolute difference to [T-1] log-probabilities, in nats per token; infinite where one is no number."""
        if logprobs.shape != (len(self.logprobs),) or not np.isfinite(logprobs).all():
            return float("inf")
        return float(np.abs(logprobs.astype(np.float64) - np.array(self.logprobs)).mean())


def canary_prompt(vocab_size: int, max_model_len: int) -> npt.NDArray[np.int32] | None:
    """[T] int32 token ids from all over the vocabulary, the same in every run; None when the context is too short.

    An engine that is asked for log-probabilities also samples a token, which needs room.
    """
    num_tokens = min(NUM_TOKENS, max_model_len - 1)
    if num_tokens < 2:
        return None
    return np.random.default_rng(SEED).integers(0, vocab_size, num_tokens, dtype=np.int32)


def make_canary(token_ids: Sequence[int], logprobs: npt.NDArray[np.float32], tolerance: float) -> Canary | None:
    """None when the learner's own log-probabilities are not finite: there is nothing to be held to."""
    if not np.isfinite(logprobs).all():
        return None
    own = tuple(min(0.0, float(logprob)) for logprob in logprobs)
    return Canary(token_ids=tuple(map(int, token_ids)), logprobs=own, tolerance=tolerance)
