"""TableEngine: a small real InferenceEngine whose policy is a table of bigram logits. For tests and fast systems.

Its log-probabilities are true, its samples depend on nothing but prompt, weights and seed, and its weights change
between two tokens, in flight.
"""

import asyncio

import numpy as np

from common.snapshot import NO_VERSION, SnapshotManifest
from rollout_server.inference import Completion, EngineError, LocalSnapshot, Sampling, WeightUpdate

TABLE_TENSOR = "table.weight"


class TableEngine:
    """pi(next | ids) = softmax(table[last of ids] / temperature), table [V, V] float32; zeros until the first load.

    V = vocabulary. step_s: seconds that one token takes, however many requests run.
    """

    def __init__(self, *, vocab_size: int, max_model_len: int, eos_id: int, step_s: float = 0.0) -> None:
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        self.loaded_version = NO_VERSION
        self._eos_id = eos_id
        self._step_s = step_s
        self._table_VV = np.zeros((vocab_size, vocab_size), dtype=np.float32)
        self._num_running = 0
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<TableEngine version {self.loaded_version}, {self._num_running} running>"

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        del request_id
        self._check_ids(prompt_ids)
        room = self.max_model_len - prompt_ids.size
        if room < 1:
            raise ValueError(f"the prompt has {prompt_ids.size} tokens, the model takes {self.max_model_len}")
        self._num_running += 1
        try:
            return await self._sample(int(prompt_ids[-1]), sampling, min(sampling.max_new_tokens, room))
        finally:
            self._num_running -= 1

    async def _sample(self, last_id: int, sampling: Sampling, num_tokens: int) -> Completion:
        uniforms = np.random.default_rng(sampling.seed).random(num_tokens)
        token_ids: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        for uniform in uniforms:
            await asyncio.sleep(self._step_s)
            self._check_open()
            logprobs_V = _log_softmax(self._table_VV[last_id] / (sampling.temperature or 1.0))
            cumulative_V = np.cumsum(np.exp(logprobs_V))
            if sampling.temperature:
                last_id = int(np.searchsorted(cumulative_V, uniform * cumulative_V[-1], side="right"))
            else:
                last_id = int(logprobs_V.argmax())
            token_ids.append(last_id)
            logprobs.append(float(logprobs_V[last_id]))
            versions.append(self.loaded_version)
            if last_id == self._eos_id:
                break
        return Completion(
            token_ids=np.array(token_ids, dtype=np.int32),
            logprobs=np.array(logprobs, dtype=np.float32),
            token_versions=np.array(versions, dtype=np.int32),
            terminated=last_id == self._eos_id,
        )

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        """A snapshot that does not fit raises EngineError and leaves the weights as they are."""
        self._check_open()
        if snapshot.manifest.adapter is not None or snapshot.manifest.is_base_model:
            raise EngineError('a table has no adapters: set lora_snapshots = "merged" on the learner')
        self._table_VV = self._read_table(snapshot)  # one assignment: no token sees half an update
        self.loaded_version = snapshot.manifest.version
        return WeightUpdate(version=self.loaded_version, pause_s=0.0)

    def _read_table(self, snapshot: LocalSnapshot) -> np.ndarray:
        manifest: SnapshotManifest = snapshot.manifest
        expected = (self.vocab_size, self.vocab_size)
        for tensor in manifest.tensors:
            if tensor.name == TABLE_TENSOR and tensor.shape == expected and tensor.dtype == "float32":
                break
        else:
            raise EngineError(f"snapshot {manifest.version} has no {TABLE_TENSOR} of shape {expected} in float32")
        with snapshot.path.open("rb") as file:
            file.seek(tensor.offset)
            data = file.read(tensor.num_bytes)
        if len(data) != tensor.num_bytes:
            raise EngineError(f"{snapshot.path} ends within {TABLE_TENSOR}")
        return np.frombuffer(data, dtype="<f4").reshape(expected)

    async def token_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        self._check_open()
        self._check_ids(token_ids)
        logprobs_TV = _log_softmax(self._table_VV[token_ids[:-1]])
        return np.take_along_axis(logprobs_TV, token_ids[1:, None], axis=-1)[:, 0].astype(np.float32)

    async def check_health(self, timeout_s: float) -> None:
        del timeout_s
        self._check_open()

    async def close(self) -> None:
        """Running requests raise EngineError at their next token."""
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineError("the engine is closed")

    def _check_ids(self, token_ids: np.ndarray) -> None:
        if token_ids.size == 0 or token_ids.min() < 0 or token_ids.max() >= self.vocab_size:
            raise ValueError(f"token ids must be some of 0..{self.vocab_size - 1}")


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted_V = logits_V.astype(np.float64) - logits_V.max(axis=-1, keepdims=True)
    return np.asarray(shifted_V - np.log(np.exp(shifted_V).sum(axis=-1, keepdims=True)))
