"""How far a right engine is from the learner on the canary's prompt, how far a wrong one, and what a canary costs.

vLLM against a transformers forward of the same weights in the same type, as the learner's is. The faults are those of
tests/rollout_server/test_canary_on_vllm.py, after some steps of training that a tensor has missed. Run as
`python -m tests.benchmarks.bench_canary`.
"""

import argparse
import asyncio
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from common.canary import TOLERANCES, canary_prompt
from learner.torch_engine import open_torch_engine
from rollout_server.inference import LocalSnapshot
from rollout_server.vllm_engine import open_vllm_engine
from rollout_server.vllm_start import VllmSettings
from tests.builders_learner import a_batch, a_group, a_trajectory, some_train_settings
from tests.models import a_model as of_shape
from tests.models import forward_logprobs, save_model, write_snapshot

MAX_MODEL_LEN = 512
VERSIONS = 8  # of unrelated weights
SIZES = {  # hidden, intermediate, layers, vocabulary
    "0.1M": (64, 128, 2, 96),
    "5M": (256, 768, 6, 2048),
    "30M": (512, 1536, 8, 8192),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def a_model(size: str, seed: int, dtype: str, *, tied: bool = True) -> Qwen2ForCausalLM:
    hidden, intermediate, layers, vocabulary = SIZES[size]
    return of_shape(
        seed, tied=tied, dtype=DTYPES[dtype], vocab_size=vocabulary, hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
    )  # fmt: skip


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


async def measure_noise(size: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_model(directory / "model", a_model(size, 0, dtype))
        settings = VllmSettings(
            model=str(directory / "model"), dtype=dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=64,
            kv_cache_bytes=64 << 20,
        )  # fmt: skip
        prompt = canary_prompt(SIZES[size][3], MAX_MODEL_LEN)
        assert prompt is not None
        means, worst = [], 0.0
        async with open_vllm_engine(settings) as engine:
            for version in range(VERSIONS):
                model, path = a_model(size, version, dtype), directory / "snapshot"
                await engine.load_weights(
                    LocalSnapshot(manifest=write_snapshot(path, model, version=version), path=path)
                )
                engines, learners = await engine.token_logprobs(prompt), forward_logprobs(model, prompt)
                means.append(distance(engines, learners))
                worst = max(worst, float(np.abs(engines - learners).max()))
    tolerance = TOLERANCES[dtype]
    print(f"{size:>5} {dtype:9} {statistics.median(means):9.1e} {max(means):9.1e} {worst:9.1e} {tolerance:9.1e} "
          f"{tolerance / max(means):10.0f}", flush=True)  # fmt: skip


def trained(model: Qwen2ForCausalLM, learning_rate: float, steps: int) -> Qwen2ForCausalLM:
    """As Adam moves weights: each by about the learning rate in every step, mostly the same way; kept in float32."""
    moved = copy.deepcopy(model).float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            drift = torch.randn(parameter.shape, generator=generator)
            parameter += learning_rate * steps**0.5 * drift
    return moved


def measure_faults(size: str) -> None:
    """Without vLLM: a fault is a model some of whose tensors are older."""
    old = a_model(size, 0, "float32")
    prompt = canary_prompt(SIZES[size][3], MAX_MODEL_LEN)
    assert prompt is not None
    for learning_rate in (1e-6, 1e-5, 1e-4):
        for steps in (1, 10, 100):
            new = trained(old, learning_rate, steps)
            right = forward_logprobs(new, prompt)
            stale_head = copy.deepcopy(new)
            stale_head.lm_head.weight = torch.nn.Parameter(old.lm_head.weight.detach().clone())
            skipped = copy.deepcopy(new)
            with torch.no_grad():
                layer = "model.layers.0.mlp.down_proj.weight"
                dict(skipped.named_parameters())[layer].copy_(dict(old.named_parameters())[layer])
            flipped = copy.deepcopy(new)
            dict(flipped.named_parameters())[layer].data.view(torch.int32).view(-1)[7] ^= 1 << 29
            row = [distance(right, forward_logprobs(wrong, prompt)) for wrong in (stale_head, skipped, flipped, old)]
            print(
                f"{size:>5} {learning_rate:9.0e} {steps:6} " + " ".join(f"{value:11.1e}" for value in row), flush=True
            )


def measure_cost(rounds: int) -> None:
    """On the thread that trains: a canary over a step of 4,096 tokens, in turn."""
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            save_model(Path(name) / "model", a_model(size, 0, "float32"))
            engine = open_torch_engine(some_train_settings(str(Path(name) / "model"), learning_rate=1e-6))
        mask, ids = [0] * 32 + [1] * 96, [5 + index % 90 for index in range(128)]
        trajectories = [a_trajectory(mask, token_ids=ids, reward=float(index % 2)) for index in range(32)]
        groups = [a_group(*trajectories[start : start + 8], task_id=start) for start in range(0, 32, 8)]
        prompt = canary_prompt(SIZES[size][3], MAX_MODEL_LEN)
        assert prompt is not None
        shares, canaries_ms = [], []
        for version in range(rounds):
            batch = a_batch(groups, version=version)
            start_s = time.perf_counter()
            engine.step(batch)
            step_s = time.perf_counter() - start_s
            engine.token_logprobs(prompt)
            canary_s = time.perf_counter() - start_s - step_s
            shares.append(canary_s / step_s)
            canaries_ms.append(canary_s * 1e3)
        print(f"{size:>5} canary {statistics.median(canaries_ms):6.1f} ms, {statistics.median(shares):5.1%} of a step "
              "of 4,096 tokens", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"vLLM against transformers, nats per token, {VERSIONS} unrelated versions each")
    print(" size type         median      most   token's tolerance  tolerance / most")
    for size in SIZES:
        for dtype in DTYPES:
            asyncio.run(measure_noise(size, dtype))
    print(
        "\nfaults, after so many steps that the stale tensors missed; nats per token from the right log-probabilities"
    )
    print(" size        lr  steps  stale head one skipped  flipped bit    all stale")
    for size in SIZES:
        measure_faults(size)
    print("\ncost to the learner")
    measure_cost(options.rounds)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
