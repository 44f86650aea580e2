"""MeteredEngine: an InferenceEngine that knows when it was busy, for metrics, the event log and the idle share."""

import time

import numpy as np

from common.events import EventLog
from rollout_server.inference import Completion, InferenceEngine, LocalSnapshot, Sampling, WeightUpdate


class MeteredEngine:
    """Passes everything through; counts tokens and the time with at least one request running."""

    def __init__(self, engine: InferenceEngine, events: EventLog) -> None:
        self._engine = engine
        self._events = events
        self._running = 0
        self._busy_since_s = 0.0
        self._busy_s = 0.0
        self.generated_tokens = 0
        self.vocab_size = engine.vocab_size
        self.max_model_len = engine.max_model_len

    def __repr__(self) -> str:
        return f"<MeteredEngine {self._running} running, {self.generated_tokens} tokens, version {self.loaded_version}>"

    @property
    def loaded_version(self) -> int:
        return self._engine.loaded_version

    @property
    def busy_s(self) -> float:
        return self._busy_s + (time.time() - self._busy_since_s if self._running else 0.0)

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        if self._running == 0:
            self._busy_since_s = time.time()
        self._running += 1
        try:
            completion = await self._engine.generate(prompt_ids, sampling, request_id)
        finally:
            self._running -= 1
            if self._running == 0:
                self._end_interval()
        self.generated_tokens += completion.token_ids.size
        return completion

    def flush(self) -> None:
        """Write the busy time so far to the event log, so that a reader need not wait for the engine to fall idle."""
        if self._running:
            self._end_interval()
            self._busy_since_s = time.time()

    def _end_interval(self) -> None:
        now_s = time.time()
        self._busy_s += now_s - self._busy_since_s
        self._events.record("generate", self._busy_since_s, now_s)

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        return await self._engine.load_weights(snapshot)

    async def token_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        return await self._engine.token_logprobs(token_ids)

    async def check_health(self, timeout_s: float) -> None:
        await self._engine.check_health(timeout_s)

    async def close(self) -> None:
        await self._engine.close()
