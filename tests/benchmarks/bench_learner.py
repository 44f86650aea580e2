"""What the learner's step costs: on DeepSpeed over plain torch, packed over padded, and in memory.

CPU time of this process, one thread, engines in turn, so that what else the machine does falls on both alike. Memory is
that of a process of its own for each measurement: what was once used is not given back. Run as
`python -m tests.benchmarks.bench_learner`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.trajectory import Group
from learner.deepspeed_engine import open_deepspeed_engine
from learner.engine_settings import ZeroStage
from learner.packing import Arrangement
from learner.ppo_engine import PpoEngine
from learner.training import TrainSettings
from tests.benchmarks.plain_network import open_plain_engine
from tests.builders_learner import a_batch, a_group, a_trajectory, some_train_settings
from tests.models import a_model, save_model

GATE, GOAL = 1.25, 1.10  # of 10M parameters in bfloat16 at stage 1
MEMORY_GATE = 0.5
GROUP_SIZE = 8
PROMPTS_AND_ANSWERS = ((8, 120), (16, 112), (64, 64), (112, 16))  # tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A model, and the trajectories of one step."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    lengths: Sequence[int]  # tokens of each trajectory
    micro_batch_tokens: int
    prompts: Sequence[int] = ()  # tokens of each trajectory's prompt; (): 8 each
    shares_prompts: bool = False  # those of a group are the same

    def save_model(self, directory: Path) -> str:
        model = a_model(
            0, tied=True, vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.intermediate,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.heads // 2,
        )  # fmt: skip
        return str(save_model(directory, model))

    def groups(self, version: int) -> list[Group]:
        rng = np.random.default_rng(version)
        prompts = self.prompts or [8] * len(self.lengths)
        words = rng.integers(5, 90, (len(self.lengths), max(prompts)))  # a prompt of each group, if they share it
        trajectories = [
            a_trajectory(
                [0] * prompt + [1] * (length - prompt),
                versions=version,
                reward=float(rng.normal()),
                token_ids=[
                    *words[index // GROUP_SIZE if self.shares_prompts else index, :prompt].tolist(),
                    *rng.integers(5, 90, length - prompt).tolist(),
                ],
                behavior_logprob=-4.0,
            )
            for index, (length, prompt) in enumerate(zip(self.lengths, prompts, strict=True))
        ]
        places = range(0, len(trajectories), GROUP_SIZE)
        return [a_group(*trajectories[at : at + GROUP_SIZE], task_id=at) for at in places]


def long_tailed(count: int, *, median: int, longest: int) -> list[int]:
    """Log-normal with a spread of 1, as lengths of answers are; the same every time."""
    rng = np.random.default_rng(0)
    lengths = median * np.exp(rng.normal(0.0, 1.0, count))
    return [int(each) for each in lengths.clip(9, longest)]


MILLIONS_10 = Workload(
    hidden=320, intermediate=1024, layers=6, heads=10, vocabulary=8192, lengths=[32] * 8, micro_batch_tokens=128
)
DEMO = Workload(
    hidden=128, intermediate=512, layers=2, heads=4, vocabulary=96, lengths=[11] * 256, micro_batch_tokens=16384
)
LONG_TAILED = Workload(
    hidden=128, intermediate=512, layers=2, heads=4, vocabulary=96,
    lengths=long_tailed(256, median=64, longest=1024), micro_batch_tokens=4096,
)  # fmt: skip
WIDE = Workload(  # 4k tokens that are trained, 32k words
    hidden=64, intermediate=256, layers=1, heads=2, vocabulary=32768,
    lengths=[256 + 8] * 16, micro_batch_tokens=16384,
)  # fmt: skip


ENGINES: Sequence[tuple[str, Workload, str, ZeroStage]] = (
    ("0.3M", DEMO, "float32", 0), ("0.3M", DEMO, "float32", 1),
    ("10M", MILLIONS_10, "bfloat16", 3), ("10M", MILLIONS_10, "bfloat16", 1),
)  # fmt: skip


def settings_for(model: str, **overrides: object) -> TrainSettings:
    return some_train_settings(model, learning_rate=1e-5, warmup_steps=0, **overrides)


def seconds(engine: PpoEngine, workload: Workload) -> tuple[float, float]:
    """Of CPU and on the wall, for a step."""
    batch = a_batch(
        workload.groups(engine.version),
        version=engine.version,
        micro_batch_tokens=workload.micro_batch_tokens,
        layout=engine.layout,
    )
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    result = engine.step(batch)
    spent_s = time.process_time() - cpu_start_s, time.perf_counter() - start_s
    assert result.refusal is None, result.refusal
    return spent_s


def cpu_seconds(engine: PpoEngine, workload: Workload) -> float:
    return seconds(engine, workload)[0]


def over_plain_torch(workload: Workload, *, dtype: str, stage: ZeroStage, rounds: int) -> tuple[float, float, float]:
    """(CPU seconds of a step on DeepSpeed, on plain torch, median of their ratio)."""
    with tempfile.TemporaryDirectory() as name:
        settings = settings_for(workload.save_model(Path(name)), dtype=dtype, zero_stage=stage)
        engines = [open_deepspeed_engine(settings), open_plain_engine(settings)]
    for engine in engines:
        cpu_seconds(engine, workload)  # warm
    pairs = []
    for index in range(rounds):
        order = (0, 1) if index % 2 else (1, 0)
        spent = {which: cpu_seconds(engines[which], workload) for which in order}
        pairs.append((spent[0], spent[1]))
    ours, plain = (statistics.median(each) for each in zip(*pairs, strict=True))
    return ours, plain, statistics.median(one / other for one, other in pairs)


LAYOUTS = {
    "in a row of segments": Arrangement(packs=True, shares=True),
    "packed": Arrangement(packs=True),
    "padded": Arrangement(),
}


def tokens_per_cpu_second(workload: Workload, rounds: int) -> dict[str, float]:
    """Tokens of trajectories, by how they are laid out."""
    with tempfile.TemporaryDirectory() as name:
        engine = open_deepspeed_engine(settings_for(workload.save_model(Path(name))))
    spent: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(rounds + 1):
        for name, engine._network.arrangement in LAYOUTS.items():
            spent[name].append(cpu_seconds(engine, workload))
    return {name: sum(workload.lengths) / statistics.median(each[1:]) for name, each in spent.items()}


def shared_over_repeated(workload: Workload, rounds: int) -> tuple[float, float, float]:
    """(share of all tokens that repeats a prompt, CPU time of a step that computes prompts once over one that computes
    them for each answer, wall time likewise): medians of pairs."""
    with tempfile.TemporaryDirectory() as name:
        engine = open_deepspeed_engine(settings_for(workload.save_model(Path(name))))
    assert engine._network.arrangement.shares
    pairs = []
    for index in range(rounds + 1):
        spent = {}
        for shares in (True, False) if index % 2 else (False, True):
            engine._network.arrangement = Arrangement(packs=True, shares=shares)
            spent[shares] = seconds(engine, workload)
        pairs.append((spent[True], spent[False]))
    repeated = sum(workload.prompts) * (GROUP_SIZE - 1) / GROUP_SIZE if workload.shares_prompts else 0.0
    cpu, wall = (statistics.median(one[i] / other[i] for one, other in pairs[1:]) for i in (0, 1))
    return repeated / sum(workload.lengths), cpu, wall


def peak_of_a_step(how: str) -> float:
    """MB beyond what there was before a step, measured by a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_learner", "--peak", how]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900).stdout
    return float(told.split()[-1])


def measure_peak(how: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        engine = open_plain_engine(settings_for(WIDE.save_model(Path(name))))
    engine._network._changes_logits = how == "naive"  # the way of models whose logits are more than a product
    batch = a_batch(WIDE.groups(0), micro_batch_tokens=WIDE.micro_batch_tokens, layout=engine.layout)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert engine.step(batch).refusal is None
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024)


def measure_engines(rounds: int) -> bool:
    print("a step on DeepSpeed over the same step in plain torch, CPU time, in turn")
    print("  model  dtype     stage  tokens  DeepSpeed      plain   ratio")
    ratio = 0.0
    for size, workload, dtype, stage in ENGINES:
        ours, plain, ratio = over_plain_torch(workload, dtype=dtype, stage=stage, rounds=rounds)
        print(f"  {size:>5}  {dtype:8} {stage:6} {sum(workload.lengths):7} {ours * 1e3:7.1f} ms {plain * 1e3:7.1f} ms "
              f"{ratio:7.2f}", flush=True)  # fmt: skip
    print(f"  10M in bfloat16 at stage 1: gate {GATE}, goal {GOAL}")
    return ratio <= GATE


def measure_packing(rounds: int) -> bool:
    rates = tokens_per_cpu_second(LONG_TAILED, rounds)
    print("trajectories of log-normal lengths that share nothing, tokens per CPU second")
    for name, rate in rates.items():
        print(f"  {name}: {rate:,.0f}, {rate / rates['padded']:.2f} times as many as padded", flush=True)
    return True


def measure_prompts(rounds: int) -> bool:
    print("a step in which each prompt is computed once, over one in which it is computed for each of eight answers")
    workloads = [
        (
            f"prompts of {prompt}, answers of {answer}",
            replace(LONG_TAILED, lengths=[prompt + answer] * 64, prompts=[prompt] * 64, shares_prompts=True),
        )
        for prompt, answer in PROMPTS_AND_ANSWERS
    ]
    demo = replace(DEMO, prompts=[6] * len(DEMO.lengths), shares_prompts=True)
    alone = replace(LONG_TAILED, lengths=[128] * 64)
    workloads += [("the demo's", demo), ("nothing shared, long-tailed", LONG_TAILED), ("nothing shared", alone)]
    for name, workload in workloads:
        repeated, cpu, wall = shared_over_repeated(workload, rounds)
        print(f"  {name}: {1 - repeated:.2f} of the tokens, {cpu:.2f} of the CPU time, {wall:.2f} of the wall time",
              flush=True)  # fmt: skip
    return True


def measure_memory(rounds: int) -> bool:
    del rounds  # it is the same every time
    chunked, naive = peak_of_a_step("chunked"), peak_of_a_step("naive")
    print("peak memory of a step of 4,096 trained tokens and 32,768 words, beyond what there was before it")
    print(f"  in chunks {chunked:,.0f} MB, all logits at once {naive:,.0f} MB: {chunked / naive:.2f} times as much, "
          f"gate {MEMORY_GATE}", flush=True)  # fmt: skip
    return chunked <= MEMORY_GATE * naive


MEASUREMENTS = {
    "memory": measure_memory, "packing": measure_packing, "prompts": measure_prompts, "engines": measure_engines
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=MEASUREMENTS)
    parser.add_argument("--peak", choices=("chunked", "naive"), help="measure that alone, in this process")
    options = parser.parse_args()
    if options.peak:
        measure_peak(options.peak)
        return
    chosen = [options.only] if options.only else list(MEASUREMENTS)
    met = [MEASUREMENTS[name](options.rounds) for name in chosen]
    sys.exit(0 if all(met) else "a gate is missed")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that are started from here
    torch.set_num_threads(1)
    main()
