"""VllmEngine: the InferenceEngine on vLLM's AsyncLLM. Only the vllm_*.py files name vllm."""

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from common.snapshot import NO_VERSION
from rollout_server.inference import Completion, EngineError, LocalSnapshot, Sampling, WeightUpdate
from rollout_server.model_tensors import check_snapshot, expected_shapes
from rollout_server.vllm_start import VllmSettings, start_vllm

MIN_TEMPERATURE = 0.01  # vLLM raises anything lower, except 0, to this; the learner would not know
SHUTDOWN_S = 0.5  # the engine's process has nothing to save


@asynccontextmanager
async def open_vllm_engine(settings: VllmSettings) -> AsyncIterator["VllmEngine"]:
    """Start vLLM on a thread, so that the event loop goes on; end its processes on leaving.

    It generates only after the first load_weights. Raises ValueError for a model or a setting that vLLM refuses.
    """
    with ThreadPoolExecutor(1, "vllm") as thread:
        others = multiprocessing.active_children()
        starting = asyncio.get_running_loop().run_in_executor(thread, start_vllm, settings)
        try:
            llm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await _give_up(starting, others)
            raise
        engine = VllmEngine(llm, settings, thread)
        try:
            yield engine
        finally:
            await engine.close()


async def _give_up(starting: asyncio.Future[Any], others: Sequence[BaseProcess]) -> None:
    """A start cannot be interrupted, but it fails at once when the engine's process dies."""
    while not starting.done():
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        await asyncio.wait([starting], timeout=0.1)
    if starting.exception() is None:
        _shut_down(starting.result())


def _shut_down(llm: Any) -> None:
    """Returns when the engine's processes are gone: by themselves, or killed."""
    processes = _processes(llm)
    llm.shutdown(SHUTDOWN_S)
    for process in processes:
        process.join(SHUTDOWN_S)


def _processes(llm: Any) -> list[BaseProcess]:
    return list(llm.engine_core.resources.engine_manager.processes)


class VllmEngine:
    """InferenceEngine on a running AsyncLLM; made by open_vllm_engine."""

    def __init__(self, llm: Any, settings: VllmSettings, thread: ThreadPoolExecutor) -> None:
        self._llm = llm
        self._model = settings.model
        self.clear_cache = settings.clear_cache
        self._thread = thread
        model_config = llm.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        self.max_model_len: int = model_config.max_model_len
        self.loaded_version = NO_VERSION
        self._dtype = str(model_config.dtype).removeprefix("torch.")
        self._shapes = expected_shapes(settings.model)
        self._eos_ids = _eos_ids(model_config.hf_config)
        self._request_numbers = itertools.count()
        self._running: set[str] = set()
        self._updating = asyncio.Lock()  # held while weights are replaced
        self._open = asyncio.Event()  # cleared while weights are replaced
        self._open.set()
        self._closed = False
        self._refusal: str | None = "no weights were loaded yet: load_weights comes first"

    def __repr__(self) -> str:
        state = self._refusal or "generating"
        return f"<VllmEngine {self._model} at {self.loaded_version}, {len(self._running)} running, {state}>"

    def process_ids(self) -> list[int]:
        """The engine's own processes, without their workers' where those are separate."""
        return [process.pid for process in _processes(self._llm) if process.pid is not None]

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        """See InferenceEngine. A call during a weight update waits and is sampled by the new weights."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_prompt(prompt_ids)
        _check_sampling(sampling)
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            stop_token_ids=self._eos_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        output = await self._run(prompt_ids, params, request_id)
        return _completion(output.outputs[0])

    async def token_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """See InferenceEngine. No weight update happens meanwhile, so that one version answers for all of them."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._check_prompt(token_ids)
        if token_ids.size < 2:
            raise ValueError(f"log-probabilities are of tokens after the first; got {token_ids.size} token")
        params = SamplingParams(
            temperature=1.0,
            max_tokens=1,
            prompt_logprobs=0,
            flat_logprobs=True,
            skip_reading_prefix_cache=True,  # a cached prefix has no log-probabilities
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        async with self._updating:
            output = await self._run(token_ids, params, "token_logprobs")
        # The first position is empty; logprobs=0 leaves exactly the token itself at every other.
        return np.array(output.prompt_logprobs.logprobs, dtype=np.float32)

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        """See InferenceEngine. Raises SnapshotError, with the engine as it was, for a snapshot of another model."""
        manifest = snapshot.manifest
        check_snapshot(snapshot, self._shapes, self._dtype)
        tensors = [(tensor.name, tensor.shape, tensor.dtype, tensor.offset) for tensor in manifest.tensors]
        async with self._updating:
            self._raise_if_closed()
            self._open.clear()
            self._refusal = f"snapshot {manifest.version} was not applied completely: load one that is whole"
            try:
                pause_s = await self._apply(manifest.version, str(snapshot.path.absolute()), tensors)
                self._refusal = None
            finally:
                self._open.set()
        return WeightUpdate(version=manifest.version, pause_s=pause_s)

    async def _apply(self, version: int, path: str, tensors: Sequence[tuple[str, tuple[int, ...], str, int]]) -> float:
        paused_at = time.perf_counter()
        with _engine_errors(f"snapshot {version} cannot be applied"):
            # The public pause_generation() also sleeps 20 ms so that outputs arrive first; spans make that needless.
            core = self._llm.engine_core
            await core.pause_scheduler_async(mode="keep", clear_cache=self.clear_cache)
            await self._llm.collective_rpc("load_snapshot", args=(path, tensors))
            await self._llm.update_weight_version(str(version))
            self.loaded_version = version
            await self._llm.resume_generation()
        return time.perf_counter() - paused_at

    async def check_health(self, timeout_s: float) -> None:
        """See InferenceEngine. A weight update delays the answer: allow for the time it takes."""
        self._raise_if_closed()
        try:
            async with asyncio.timeout(timeout_s):
                with _engine_errors("health check"):
                    await self._llm.collective_rpc("check_health")
        except TimeoutError as error:
            raise EngineError(f"vLLM's engine did not answer within {timeout_s} s") from error

    async def close(self) -> None:
        """See InferenceEngine. Calls of generate() in flight raise EngineError."""
        if self._closed:
            return
        self._closed = True
        self._refusal = "the engine is closed"
        self._open.set()
        await self._llm.abort(self._running)
        await asyncio.get_running_loop().run_in_executor(self._thread, _shut_down, self._llm)

    async def _run(self, prompt_ids: np.ndarray, params: Any, request_id: str) -> Any:
        """vLLM's final output for one prompt."""
        await self._open.wait()
        if self._refusal is not None:
            raise EngineError(f"the engine does not generate: {self._refusal}")
        # The salt keeps a request from reading prefixes that another version's weights computed.
        prompt = {"type": "token", "prompt_token_ids": prompt_ids.tolist(), "cache_salt": str(self.loaded_version)}
        unique_id = f"{request_id}-{next(self._request_numbers)}"
        self._running.add(unique_id)
        try:
            with _engine_errors(f"request {request_id}"):
                [output] = [final async for final in self._llm.generate(prompt, params, unique_id)]
        finally:
            self._running.discard(unique_id)
        if (reason := output.outputs[0].finish_reason) not in ("stop", "length"):
            raise EngineError(f"request {request_id} ended with {reason!r}: {self._refusal or 'vLLM gave it up'}")
        return output

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise EngineError("the engine is closed")

    def _check_prompt(self, prompt_ids: np.ndarray) -> None:
        if not 0 < prompt_ids.size < self.max_model_len:
            raise ValueError(
                f"a prompt has 1 to {self.max_model_len - 1} tokens, to leave room for one more; got {prompt_ids.size}"
            )
        if prompt_ids.min() < 0 or prompt_ids.max() >= self.vocab_size:
            raise ValueError(f"token ids are 0 to {self.vocab_size - 1}, got {prompt_ids.min()} to {prompt_ids.max()}")


def _check_sampling(sampling: Sampling) -> None:
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {sampling.max_new_tokens}")
    if sampling.temperature != 0 and not sampling.temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature must be >= {MIN_TEMPERATURE}, or 0 for greedy, got {sampling.temperature}")


def _completion(output: Any) -> Completion:
    """Raises EngineError unless every token has its log-probability and its version."""
    num_tokens = len(output.token_ids)
    if len(output.logprobs.logprobs) != num_tokens:
        raise EngineError(f"{num_tokens} tokens, but {len(output.logprobs.logprobs)} log-probabilities")
    return Completion(
        token_ids=np.array(output.token_ids, dtype=np.int32),
        logprobs=np.array(output.logprobs.logprobs, dtype=np.float32),
        token_versions=token_versions(output.weight_versions or (), num_tokens),
        terminated=output.finish_reason == "stop",
    )


def token_versions(spans: Any, num_tokens: int) -> np.ndarray:
    """Versions per token [num_tokens] int32 from vLLM's spans [start, end), which must tile the tokens."""
    versions = np.empty(num_tokens, dtype=np.int32)
    end = 0
    for span in spans:
        if span.start != end or not span.version.isdecimal():
            raise EngineError(f"weight version span {span} does not continue at token {end} with a number")
        versions[end : span.end] = int(span.version)
        end = span.end
    if end != num_tokens:
        raise EngineError(f"weight version spans cover {end} of {num_tokens} tokens")
    return versions


def _eos_ids(hf_config: Any) -> list[int]:
    """End-of-sequence ids of the model's config; vLLM adds those of the tokenizer and of generation_config.json."""
    ids = getattr(hf_config, "eos_token_id", None)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


@contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """vLLM raises ValueErrors for bad requests, and bare Exceptions for what failed in its processes."""
    try:
        yield
    except (ValueError, TimeoutError):
        raise
    except Exception as error:
        raise EngineError(f"{what}: {error}") from error
