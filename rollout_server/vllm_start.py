"""Starting vLLM: its settings, the environment it reads, and the AsyncLLM that results.

vLLM reads its environment when it is imported and again when it starts. It is therefore imported in functions here,
after the environment is set, and not with the module.
"""

import asyncio
import gc
import os
import sys
import warnings
from dataclasses import dataclass
from typing import Any, get_args

import torch

from common.lifecycle import UserError
from rollout_server.model_tensors import checkpoint_dtype

CPU_KV_CACHE_BYTES = 256 << 20
SHUTDOWN_S = 0.5  # the engine has nothing to save
RANKS_SHUTDOWN_S = 10.0  # at most; with several ranks it has to give back the shared memory that they talk through
KILLED_S = 5.0  # until a process is gone that was killed


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSlots:
    """Room for low-rank adapters beside the model, taken at the start."""

    rank: int  # at most
    target_modules: tuple[str, ...]  # such as q_proj
    versions: int  # in use at once


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSettings:
    """How to run vLLM. None means: what suits the machine."""

    model: str  # directory or Hugging Face name; only config and tokenizer are read, weights come from snapshots
    dtype: str = "auto"  # of weights and activations; "auto" is what the model's config says (vLLM would halve it)
    max_model_len: int | None = None  # prompt and completion together; None is what the model can do
    max_num_seqs: int = 256  # requests that run at once; more wait in vLLM's queue
    kv_cache_bytes: int | None = None  # on GPU None leaves it to gpu_memory_utilization
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    enforce_eager: bool | None = None  # None: eager on CPU, where compiling takes longer than it saves
    cpu_threads: int | None = None  # per worker; None is OMP_NUM_THREADS, or 1: more only pays for large models
    clear_cache: bool = True  # on a weight update, recompute running requests' KV cache: their versions are then exact
    adapters: AdapterSlots | None = None  # None: snapshots are the whole policy
    seed: int = 0


def start_vllm(settings: VllmSettings) -> Any:
    """Import vLLM and start an AsyncLLM with dummy weights; takes seconds to minutes.

    Raises ValueError for a model or a setting that cannot work, UserError for adapters that cannot.
    """
    on_cpu = torch.version.cuda is None and torch.version.hip is None
    _prepare_environment(settings, on_cpu=on_cpu)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how vLLM uses its own dependencies
        from vllm.v1.engine.async_llm import AsyncLLM

        class QuietAsyncLLM(AsyncLLM):
            """Its destructor calls functions that are gone by the time the interpreter ends, and complains."""

            def __del__(self) -> None:
                if not sys.is_finalizing():
                    super().__del__()

        config = _engine_config(settings, on_cpu=on_cpu)
        if on_cpu:
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # making the config has set "spawn": seconds slower
        llm = QuietAsyncLLM.from_vllm_config(config, disable_log_stats=True)
    # A full collection looks at all of what was imported, and holds up the event loop for half a second.
    gc.collect()
    gc.freeze()
    return llm


async def stop_vllm(llm: Any) -> None:
    """End the processes of an AsyncLLM; abort what runs before, or it never returns."""
    if llm.output_handler is not None:  # it takes the end of the engine for a failure, and says so
        llm.output_handler.cancel()
    processes = llm.engine_core.resources.engine_manager.processes
    ranks = llm.vllm_config.parallel_config.world_size
    await asyncio.to_thread(llm.shutdown, SHUTDOWN_S if ranks == 1 else RANKS_SHUTDOWN_S)
    for process in processes:
        await asyncio.to_thread(process.join, KILLED_S)  # vLLM does not wait for those that it kills
    context = llm.engine_core.ctx
    if all(socket.closed for socket in context._sockets):
        context._shadow_obj.term()  # vLLM leaves it, with its threads, to the garbage collector


def _prepare_environment(settings: VllmSettings, *, on_cpu: bool) -> None:
    """Set what vLLM and its processes read from the environment; what the user has set stays."""
    # On CPU every start warns of half a dozen things that are as they should be.
    defaults = {"VLLM_LOGGING_LEVEL": "ERROR" if on_cpu else "WARNING", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # The worker lives in the engine's process: one import and one process less.
        defaults |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if settings.enforce_eager is not False:
            defaults["TORCH_COMPILE_DISABLE"] = "1"  # else the first request with log-probabilities compiles for 10 s
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    os.environ["ROLLOUT_SERVER_PID"] = str(os.getpid())  # vllm_worker.py ends when this process does
    if on_cpu:
        # torch has read its variables already, and the engine's process inherits torch as it is here.
        threads = settings.cpu_threads or int(os.environ.get("OMP_NUM_THREADS", "1"))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
            torch._dynamo.config.disable = True


def _engine_config(settings: VllmSettings, *, on_cpu: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    config = AsyncEngineArgs(
        model=settings.model,
        dtype=checkpoint_dtype(settings.model) if settings.dtype == "auto" else settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        kv_cache_memory_bytes=settings.kv_cache_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None),
        gpu_memory_utilization=settings.gpu_memory_utilization,
        tensor_parallel_size=settings.tensor_parallel_size,
        enforce_eager=on_cpu if settings.enforce_eager is None else settings.enforce_eager,
        seed=settings.seed,
        load_format="dummy",
        # Log-probabilities of the distribution sampled from; and it is the whole one, whatever the model suggests.
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        # A seeded request whose prompt is computed in parts kills vLLM on CPU: it rewinds a generator that cannot be.
        enable_chunked_prefill=False if on_cpu else None,
        enable_prefix_caching=True,
        scheduling_policy="priority",  # all requests have the same, except those of vllm_engine.URGENT
        worker_extension_cls="rollout_server.vllm_worker.SnapshotLoader",
        disable_log_stats=True,
        **(_adapter_arguments(settings.adapters) if settings.adapters is not None else {}),
    ).create_engine_config()
    if config.model_config.quantization is not None:
        raise ValueError(
            f"{settings.model} is quantised ({config.model_config.quantization}); weights like that cannot be updated"
        )
    if settings.adapters is not None:
        _check_adapters_supported(config.model_config)
    return config


def _adapter_arguments(slots: AdapterSlots) -> dict[str, Any]:
    """Raises UserError for a rank that vLLM does not take."""
    from vllm.config.lora import MaxLoRARanks

    allowed = [rank for rank in get_args(MaxLoRARanks) if rank >= slots.rank]
    if not allowed:
        raise UserError(
            f"the learner's adapters have rank {slots.rank}, vLLM takes at most {max(get_args(MaxLoRARanks))}: set "
            'lora_rank lower, or lora_snapshots = "merged", on the learner'
        )
    return {
        "enable_lora": True,
        "max_lora_rank": min(allowed),
        "max_loras": slots.versions,
        "max_cpu_loras": slots.versions,
        "lora_target_modules": list(slots.target_modules),
    }


def _check_adapters_supported(model_config: Any) -> None:
    """Raises UserError where vLLM has no adapters for this architecture; its own process would only die of it."""
    from vllm.model_executor.model_loader.utils import get_model_architecture
    from vllm.model_executor.models import supports_lora

    model_class, architecture = get_model_architecture(model_config)
    if not supports_lora(model_class):
        raise UserError(
            f'vLLM has no adapters for {architecture}: set lora_snapshots = "merged" on the learner, and it publishes '
            "the whole policy"
        )
