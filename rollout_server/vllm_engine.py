"""VllmEngine: the InferenceEngine on vLLM's AsyncLLM. Only the vllm_*.py files name vllm."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from common.lifecycle import DedicatedThread
from common.snapshot import NO_VERSION, SnapshotError
from rollout_server.adapter_versions import HeldAdapter
from rollout_server.in_place_changes import InPlaceChanges, Patch
from rollout_server.inference import Completion, EngineError, LocalSnapshot, Sampling, WeightUpdate
from rollout_server.model_tensors import check_snapshot, expected_shapes
from rollout_server.vllm_adapters import VllmAdapters, request_of
from rollout_server.vllm_requests import completion_of, eos_ids, logprobs_params, sampling_params
from rollout_server.vllm_start import VllmSettings, start_vllm, stop_vllm

URGENT = -1  # smaller comes first: a canary must not wait for thousands of requests that vLLM has queued
NO_ADAPTER = "the base model is loaded, and no adapter yet"


@asynccontextmanager
async def open_vllm_engine(settings: VllmSettings) -> AsyncIterator["VllmEngine"]:
    """Start vLLM on a thread, so that the event loop goes on; end its processes on leaving.

    It generates only after the first load_weights. Raises ValueError for a model or a setting that vLLM refuses.
    """
    others = multiprocessing.active_children()
    starting = asyncio.ensure_future(asyncio.to_thread(start_vllm, settings))
    try:
        llm = await asyncio.shield(starting)
    except asyncio.CancelledError:
        await _give_up(starting, others)
        raise
    engine = VllmEngine(llm, settings)
    try:
        yield engine
    finally:
        await engine.close()


async def _give_up(starting: asyncio.Future[Any], others: Sequence[BaseProcess]) -> None:
    """A start cannot be interrupted, and left alone would leave its processes; it fails once the engine's is dead."""
    while not starting.done():
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        await asyncio.wait([starting], timeout=0.1)
    if starting.exception() is None:
        await stop_vllm(starting.result())


class VllmEngine:
    """InferenceEngine on a running AsyncLLM; made by open_vllm_engine."""

    def __init__(self, llm: Any, settings: VllmSettings) -> None:
        self._llm = llm
        self._model = settings.model
        self.clear_cache = settings.clear_cache
        model_config = llm.model_config
        self.vocab_size: int = model_config.get_vocab_size()
        self.max_model_len: int = model_config.max_model_len
        self.loaded_version = NO_VERSION
        self._dtype = str(model_config.dtype).removeprefix("torch.")
        self._shapes = expected_shapes(settings.model)
        self._eos_ids = eos_ids(model_config.hf_config)
        self._calls: set[asyncio.Timeout] = set()  # of vLLM, in flight
        self._updating = asyncio.Lock()  # held while weights are replaced
        self._in_place = InPlaceChanges()
        self._preparing = DedicatedThread("changes")
        self._open = asyncio.Event()  # cleared while weights are replaced
        self._open.set()
        self._adapters: VllmAdapters | None = None
        if settings.adapters is not None:
            self._adapters = VllmAdapters(llm, settings.adapters, max_num_seqs=settings.max_num_seqs)
        self._num_base_models = 0  # loaded so far; vLLM labels what adapters sample with it
        self._ended: str | None = None  # how
        self._refusal: str | None = "no weights were loaded yet: load_weights comes first"

        # vLLM's reader of outputs ends when the engine dies; calls that wait for anything else would wait for ever.
        llm._run_output_handler()
        llm.output_handler.add_done_callback(lambda _: self._end(self._ended or "died"))

    def __repr__(self) -> str:
        state = self._ended or self._refusal or "generating"
        return f"<VllmEngine {self._model} at {self.loaded_version}, {len(self._calls)} calls, {state}>"

    def process_ids(self) -> list[int]:
        """The engine's own processes, without their workers' where those are separate."""
        return [process.pid for process in self._llm.engine_core.resources.engine_manager.processes]

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        """See InferenceEngine. A call during a weight update waits and is sampled by the new weights."""
        self._check_prompt(prompt_ids)
        params = sampling_params(sampling, self._eos_ids)
        seat: AbstractAsyncContextManager[Any] = self._adapters.seats if self._adapters is not None else nullcontext()
        async with seat:
            output, adapter = await self._run(prompt_ids, params, request_id)
        return completion_of(output.outputs[0], adapter)

    async def token_logprobs(self, token_ids: np.ndarray) -> np.ndarray:
        """See InferenceEngine. No weight update happens meanwhile, so that one version answers for all of them."""
        self._check_prompt(token_ids)
        if token_ids.size < 2:
            raise ValueError(f"log-probabilities are of tokens after the first; got {token_ids.size} token")
        async with self._updating:
            output, _ = await self._run(token_ids, logprobs_params(), "token_logprobs", priority=URGENT)
        # The first position is empty; logprobs=0 leaves exactly the token itself at every other.
        return np.array(output.prompt_logprobs.logprobs, dtype=np.float32)

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        """See InferenceEngine. Raises SnapshotError, with the engine as it was, for a snapshot of another model."""
        manifest = snapshot.manifest
        if manifest.adapter is not None:
            return await self._load_adapter(snapshot)
        check_snapshot(snapshot, self._shapes, self._dtype)
        async with self._updating, self._call(f"{manifest.title} cannot be applied"):
            known_version = NO_VERSION if self._refusal is not None else self.loaded_version
            patches = await self._preparing.run(self._in_place.prepare, snapshot, known_version)
            self._open.clear()
            self._refusal = f"{manifest.title} was not applied completely: load one that is whole"
            try:
                if self._adapters is not None:
                    await self._adapters.retire()
                pause_s = await self._apply(snapshot, patches)
                self._refusal = NO_ADAPTER if manifest.is_base_model else None
                if self._adapters is not None and manifest.is_base_model:
                    self._adapters.base_model = manifest.content_digest
            finally:
                self._open.set()
        return WeightUpdate(version=manifest.version, pause_s=pause_s, in_place=patches is not None)

    async def _load_adapter(self, snapshot: LocalSnapshot) -> WeightUpdate:
        """Beside those that running requests began with and end on: nothing is computed again, nothing fails by it."""
        version = snapshot.manifest.version
        if self._adapters is None:
            raise SnapshotError(f"snapshot {version} is an adapter, and this engine was started without room for any")
        self._adapters.check(snapshot, self._shapes, self._dtype)
        async with self._call(f"snapshot {version} cannot be applied"):
            await self._adapters.wait_for_room(version)
            async with self._updating:
                pause_s = await self._adapters.load(snapshot, self._preparing)
                self.loaded_version, self._refusal = version, None
        return WeightUpdate(version=version, pause_s=pause_s, in_place=True)

    async def _apply(self, snapshot: LocalSnapshot, patches: Sequence[Patch] | None) -> float:
        """Returns the seconds of the pause."""
        version = snapshot.manifest.version
        # The public pause_generation() also sleeps 20 ms so that outputs arrive first; spans make that needless.
        core = self._llm.engine_core
        # A number that comes again stands for other weights: the former were wrong, or of another life of the run.
        # What they have cached has the same salt.
        clear_cache = self.clear_cache or version <= self.loaded_version or self._adapters is not None
        await core.pause_scheduler_async(mode="keep", clear_cache=clear_cache)
        paused_at = time.perf_counter()
        self._num_base_models += snapshot.manifest.is_base_model
        label = self._num_base_models if snapshot.manifest.is_base_model else version
        copied = self._copy_whole(snapshot) if patches is None else self._write_changes(patches)
        # Together, which saves a journey. Both are waited for, whatever becomes of the other; else it stays paused.
        for failed in await asyncio.gather(copied, self._llm.update_weight_version(str(label)), return_exceptions=True):
            if failed is not None:
                raise failed
        self.loaded_version = version
        await self._llm.resume_generation()
        return time.perf_counter() - paused_at

    async def _copy_whole(self, snapshot: LocalSnapshot) -> None:
        tensors = [(tensor.name, tensor.shape, tensor.dtype, tensor.offset) for tensor in snapshot.manifest.tensors]
        self._in_place.learn(
            await self._llm.collective_rpc("load_snapshot", args=(str(snapshot.path.absolute()), tensors))
        )

    async def _write_changes(self, patches: Sequence[Patch]) -> None:
        rows = [(patch.rank, str(patch.path), patch.num_items, patch.parts) for patch in patches]
        await self._llm.collective_rpc("write_changes", args=(rows,))

    async def check_health(self, timeout_s: float) -> None:
        """See InferenceEngine. A weight update delays the answer: allow for the time it takes."""
        try:
            async with asyncio.timeout(timeout_s), self._call("health check"):
                await self._llm.collective_rpc("check_health")
        except TimeoutError as error:
            raise EngineError(f"vLLM's engine did not answer within {timeout_s} s") from error

    async def close(self) -> None:
        """See InferenceEngine. Calls in flight raise EngineError."""
        if self._ended == "was closed":
            return
        self._end("was closed")
        await stop_vllm(self._llm)
        await asyncio.to_thread(self._preparing.close)
        self._in_place.close()

    def _end(self, how: str) -> None:
        self._ended = how
        for call in self._calls:
            call.reschedule(asyncio.get_running_loop().time())

    def _newest_adapter(self) -> AbstractAsyncContextManager[HeldAdapter | None]:
        return self._adapters.newest() if self._adapters is not None else nullcontext()

    async def _run(
        self, prompt_ids: np.ndarray, params: Any, request_id: str, *, priority: int = 0
    ) -> tuple[Any, HeldAdapter | None]:
        """vLLM's final output for one prompt, and the adapter that sampled it, if one did."""
        await self._open.wait()
        if self._refusal is not None:
            raise EngineError(f"the engine does not generate: {self._refusal}")
        async with self._newest_adapter() as adapter, self._call(f"request {request_id}"):
            # The salt keeps a request from reading prefixes that another version's weights computed.
            salt = adapter.name if adapter is not None else str(self.loaded_version)
            prompt = {"type": "token", "prompt_token_ids": prompt_ids.tolist(), "cache_salt": salt}
            call = self._llm.generate(prompt, params, request_id, lora_request=request_of(adapter), priority=priority)
            [output] = [final async for final in call]
        if (reason := output.outputs[0].finish_reason) not in ("stop", "length"):
            raise EngineError(f"request {request_id}: vLLM ended it with {reason!r}")
        return output, adapter

    @asynccontextmanager
    async def _call(self, what: str) -> AsyncIterator[None]:
        """A call of vLLM, which raises ValueErrors for what is asked and bare Exceptions for what failed inside."""
        if self._ended:
            raise EngineError(f"{what}: the engine {self._ended}")
        try:
            async with asyncio.timeout(None) as until_end:
                self._calls.add(until_end)
                try:
                    yield
                finally:
                    self._calls.discard(until_end)
        except TimeoutError as error:
            raise EngineError(f"{what}: the engine {self._ended}") from error
        except ValueError:
            raise
        except Exception as error:
            raise EngineError(f"{what}: {error}") from error

    def _check_prompt(self, prompt_ids: np.ndarray) -> None:
        if not 0 < prompt_ids.size < self.max_model_len:
            raise ValueError(
                f"a prompt has 1 to {self.max_model_len - 1} tokens, to leave room for one more; got {prompt_ids.size}"
            )
        if prompt_ids.min() < 0 or prompt_ids.max() >= self.vocab_size:
            raise ValueError(f"token ids are 0 to {self.vocab_size - 1}, got {prompt_ids.min()} to {prompt_ids.max()}")
