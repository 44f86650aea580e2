"""CanaryMaker: which versions carry a canary, and what the learner's own forward pass says of its prompt."""

import logging

import numpy as np

from common.canary import TOLERANCES, Canary, make_canary
from learner.training import TrainEngine

logger = logging.getLogger(__name__)

LARGE_MODEL = 2_000_000_000  # parameters; from there on, one forward pass for each version is not nothing
LARGE_MODEL_EVERY = 10


def default_canary_every(num_parameters: int) -> int:
    """Versions from one canary to the next."""
    return 1 if num_parameters < LARGE_MODEL else LARGE_MODEL_EVERY


class CanaryMaker:
    """Every `every`-th version carries one, and so does the first that this learner publishes; 0: none does."""

    def __init__(self, *, every: int, prompt: np.ndarray | None, dtype: str, tolerance: float | None = None) -> None:
        """prompt: [T] token ids, None where the model's context has no room for one. tolerance None: as suits dtype."""
        self._every = every if prompt is not None else 0
        self._prompt = prompt
        self._tolerance = tolerance or TOLERANCES[dtype]
        self._made_any = False

    def make(self, engine: TrainEngine) -> Canary | None:
        """Of the engine's parameters as they are: one forward pass, on the thread that trains, between two steps."""
        if self._prompt is None or self._every == 0:
            return None
        if self._made_any and engine.version % self._every != 0:
            return None
        canary = make_canary(self._prompt.tolist(), engine.token_logprobs(self._prompt), self._tolerance)
        if canary is None:
            logger.warning("version %d gives its canary no finite log-probabilities: it has none", engine.version)
        self._made_any = True
        return canary
