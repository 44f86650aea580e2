"""InferenceEngine: what the rollout server needs of an engine, and the values that cross that line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from common.snapshot import SnapshotManifest
from rollout_server.local_changes import LocalChanges


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample one completion. There is no top-p or top-k: truncating the distribution would bias the
    importance weights, because the learner's log-probabilities are those of the whole distribution."""

    temperature: float  # 0: always the likeliest token, and log-probabilities at temperature 1
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Completion:
    """What the policy sampled after a prompt. N = sampled tokens, the end-of-sequence token included."""

    token_ids: np.ndarray  # [N] int32
    logprobs: np.ndarray  # [N] float32; log-probability under the distribution sampled from, temperature included
    token_versions: np.ndarray  # [N] int32; the policy version that sampled each token, as the engine says
    terminated: bool  # True: the policy ended the text. False: it was cut at max_new_tokens or the context length


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSnapshot:
    """A snapshot whose bytes lie, pulled and verified, in a local file.

    An engine that is at changes.base_version may write nothing but the changed elements.
    """

    manifest: SnapshotManifest
    path: Path
    changes: LocalChanges | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """What applying a snapshot cost."""

    version: int
    pause_s: float  # time during which no token was generated
    in_place: bool = False  # nothing but what changed was written; else all was copied


class EngineError(RuntimeError):
    """The engine is dead or its weights are unknown; it must not generate any more."""


class InferenceEngine(Protocol):
    """An engine that samples while its weights are replaced under it. All methods may run concurrently."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def loaded_version(self) -> int:
        """snapshot.NO_VERSION until the first load_weights."""
        ...

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        """Sample one completion of prompt_ids [T] int32. Cancelling the call aborts the request in the engine.

        Raises ValueError for a prompt that does not fit, EngineError when the engine died.
        """
        ...

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        """Replace all weights in place; running requests go on under the new ones.

        An adapter is added beside those that are there: running requests end on the one that they began with. One whose
        base model is not the engine's is refused with a SnapshotError. A base model comes before the first adapter: the
        engine generates only once it has both.
        Raises EngineError, and refuses to generate, when the weights are in an unknown state afterwards.
        """
        ...

    async def token_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """log pi of tokens 1..T-1 of token_ids [T] given those before, at temperature 1: [T-1] float32."""
        ...

    async def check_health(self, timeout_s: float) -> None:
        """Raises EngineError unless the engine itself (not only its front) answers within timeout_s."""
        ...

    async def close(self) -> None:
        """End the engine's processes and abort what is running. Safe to call twice."""
        ...
