"""Tokens per second of VllmEngine.generate over a bare AsyncLLM: what our side of the engine costs.

Both sample the same prompts with the same seeds, batch, temperature and log-probabilities, on the same engine, in
turns that swap their order. Run as `python -m tests.benchmarks.bench_rollout`.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import uvloop

from rollout_server.inference import LocalSnapshot, Sampling
from rollout_server.vllm_engine import VllmEngine, open_vllm_engine
from rollout_server.vllm_start import VllmSettings
from tests.models import FIRST_WORD_ID, VOCAB_SIZE, a_tiny_model, save_tiny_model, write_snapshot

GOAL = 0.98
GATE = 0.90
PROMPT_TOKENS = 32

Contender = Callable[[np.ndarray, Sampling, str], Awaitable[int]]
"""Samples one completion and returns its number of tokens."""


def engine_contender(engine: VllmEngine) -> Contender:
    async def sample(prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> int:
        return (await engine.generate(prompt_ids, sampling, request_id)).token_ids.size

    return sample


def bare_contender(engine: VllmEngine, *, output_kind: str, flat_logprobs: bool) -> Contender:
    """The same AsyncLLM, called as little as possible: its output is not even looked at."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    async def sample(prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> int:
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            stop_token_ids=engine._eos_ids,
            logprobs=0,
            flat_logprobs=flat_logprobs,
            detokenize=False,
            output_kind=RequestOutputKind[output_kind],
        )
        prompt = {"type": "token", "prompt_token_ids": prompt_ids.tolist()}
        num_tokens = 0
        async for output in engine._llm.generate(prompt, params, request_id):
            num_tokens += len(output.outputs[0].token_ids)
        return num_tokens

    return sample


async def measure(contender: Contender, *, batch: int, new_tokens: int, turn: int) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds of this process, and tokens of one batch; `turn` keeps prompts out of the cache."""
    prompts = np.random.default_rng(turn).integers(FIRST_WORD_ID, VOCAB_SIZE, (batch, PROMPT_TOKENS), dtype=np.int32)
    wall, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(
                contender(prompt, Sampling(temperature=1.0, max_new_tokens=new_tokens, seed=i), f"{turn}-{i}")
            )
            for i, prompt in enumerate(prompts)
        ]
    return time.perf_counter() - wall, time.process_time() - cpu, sum(task.result() for task in running)


async def compare(arguments: argparse.Namespace, directory: Path) -> float:
    """Median over the pairs of ours over bare, in tokens per second."""
    save_tiny_model(directory / "model", tied=True)
    settings = VllmSettings(model=str(directory / "model"), max_num_seqs=arguments.batch)
    rates: dict[str, list[float]] = {"bare": [], "engine": []}
    cpu_us: dict[str, list[float]] = {"bare": [], "engine": []}
    async with open_vllm_engine(settings) as engine:
        manifest = write_snapshot(directory / "snapshot", a_tiny_model(1, tied=True), version=1)
        await engine.load_weights(LocalSnapshot(manifest=manifest, path=directory / "snapshot"))
        bare = bare_contender(engine, output_kind=arguments.bare, flat_logprobs=not arguments.bare_dicts)
        contenders = {"bare": bare, "engine": engine_contender(engine)}
        for pair in range(-1, arguments.pairs):  # the first warms up
            for name in sorted(contenders, reverse=pair % 2 == 1):
                wall_s, cpu_s, tokens = await measure(
                    contenders[name], batch=arguments.batch, new_tokens=arguments.new_tokens, turn=pair + 1
                )
                if pair >= 0:
                    rates[name].append(tokens / wall_s)
                    cpu_us[name].append(cpu_s / tokens * 1e6)
    for name in contenders:
        rate, cpu = statistics.median(rates[name]), statistics.median(cpu_us[name])
        print(f"{name:7} median {rate:8.0f} tokens/s, {cpu:5.1f} us of this process's CPU per token")
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates["bare"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{len(ratios)} pairs, half of the ratios between {low:.3f} and {high:.3f}")
    return statistics.median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--bare", choices=["DELTA", "FINAL_ONLY"], default="FINAL_ONLY", help="how the bare side reads")
    parser.add_argument("--bare-dicts", action="store_true", help="the bare side has log-probabilities in dicts")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        ratio = uvloop.run(compare(arguments, Path(directory)))
    print(f"VllmEngine / bare AsyncLLM: median {ratio:.3f} (goal {GOAL}, gate {GATE})")
    return 0 if ratio >= GATE else 1


if __name__ == "__main__":
    raise SystemExit(main())
