"""The workload of bench_overlap, and each half of it alone. `python -m tests.benchmarks.overlap_workload HALF DIR`.

The learning rate is zero, so that the policy stays what it was, every task has the same samples in every run (tasks
fix the seeds), and the pipeline and its halves do the same work.
"""

import asyncio
import json
import sys
import time
from pathlib import Path

import msgspec
import torch
import uvloop
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from common.codec import pack_group, unpack_groups
from common.messages import GroupHeader, Lease
from common.snapshot import TensorSpec, build_manifest
from common.trajectory import Group
from learner.batching import build_batch
from learner.coordinator.tasks import open_tasks
from learner.demo.model import save_tokenizer
from learner.training import TrainSettings
from rollout_server.environments import environment_at
from rollout_server.episodes import EpisodeRunner
from rollout_server.inference import LocalSnapshot
from rollout_server.vllm_engine import open_vllm_engine
from rollout_server.vllm_start import VllmSettings

STEPS = 14
GROUPS_PER_STEP = 8
GROUP_SIZE = 8
MAX_NEW_TOKENS = 64
MAX_MODEL_LEN = 96
IN_FLIGHT_STEPS = 3  # as pacing allows at a staleness of 2
DATA = "python:learner.demo.task:training_prompts"
ENVIRONMENT = "python:learner.demo.task:reward"
POLL_S = 0.005


def build_model(directory: Path) -> None:
    """5M parameters, random: completions end at random, 40 tokens long on average."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=256, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)


def at_the_signal(directory: Path, name: str) -> None:
    """Both halves start together: each says that it is ready, and waits for the other's start."""
    (directory / f"{name}.ready").touch()
    while not (directory / "go").exists():
        time.sleep(POLL_S)


async def generate(directory: Path) -> list[Group]:
    """All groups of all steps, as many in flight as the pipeline has. Writes the wall time."""
    model = Qwen2ForCausalLM.from_pretrained(directory / "model")
    path, layout, data = directory / "weights.bin", [], bytearray()
    for name, parameter in model.named_parameters():
        layout.append(TensorSpec(name=name, shape=tuple(parameter.shape), dtype="float32", offset=len(data)))
        data += parameter.detach().numpy().tobytes()
    path.write_bytes(data)
    manifest = build_manifest(memoryview(data), tuple(layout), run_id="bench", version=0)
    tasks = open_tasks(DATA, seed=0)
    room = asyncio.Semaphore(IN_FLIGHT_STEPS * GROUPS_PER_STEP)
    groups: list[Group] = []

    async def one(runner: EpisodeRunner, task_id: int) -> None:
        task = tasks.task(task_id)
        lease = Lease(
            lease_id=task_id, task_id=task_id, environment=ENVIRONMENT, row=task.row, group_size=GROUP_SIZE,
            seed=task.seed, min_version=0, max_group_bytes=1 << 30,
        )  # fmt: skip
        try:
            groups.append(await runner.run(lease))
        finally:
            room.release()

    settings = VllmSettings(model=str(directory / "model"), dtype="float32", max_model_len=MAX_MODEL_LEN)
    async with open_vllm_engine(settings) as engine, environment_at(ENVIRONMENT) as environment:
        await engine.load_weights(LocalSnapshot(manifest=manifest, path=path))
        runner = EpisodeRunner(
            engine, {ENVIRONMENT: environment}, AutoTokenizer.from_pretrained(directory / "model"), temperature=1.0,
            max_new_tokens=MAX_NEW_TOKENS, max_model_len=MAX_MODEL_LEN, wait_for_version=no_wait,
        )  # fmt: skip
        at_the_signal(directory, "generation")
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for task_id in range(STEPS * GROUPS_PER_STEP):
                await room.acquire()
                group.create_task(one(runner, task_id))
        report(directory, "generation", time.perf_counter() - started_s)
    return sorted(groups, key=lambda each: each.lease_id)


async def no_wait(version: int) -> None:
    del version


def record(directory: Path, groups: list[Group]) -> None:
    packed = [pack_group(group) for group in groups]
    (directory / "groups.headers").write_bytes(msgspec.msgpack.encode([header for header, _ in packed]))
    (directory / "groups.payload").write_bytes(b"".join(payload for _, payload in packed))


def train(directory: Path) -> None:
    """All steps on recorded groups. Writes the wall time."""
    from learner.deepspeed_engine import open_deepspeed_engine

    headers = msgspec.msgpack.decode((directory / "groups.headers").read_bytes(), type=list[GroupHeader])
    groups = unpack_groups(headers, (directory / "groups.payload").read_bytes())
    settings = TrainSettings(model=str(directory / "model"), learning_rate=0.0, total_steps=STEPS, max_staleness=2)
    engine = open_deepspeed_engine(settings)
    at_the_signal(directory, "training")
    started_s = time.perf_counter()
    for step in range(STEPS):
        batch = groups[step * GROUPS_PER_STEP : (step + 1) * GROUPS_PER_STEP]
        engine.step(build_batch(batch, version=0, max_staleness=2, micro_batch_tokens=settings.micro_batch_tokens))
    report(directory, "training", time.perf_counter() - started_s)


def report(directory: Path, half: str, wall_s: float) -> None:
    (directory / f"{half}.json").write_text(json.dumps({"wall_s": wall_s}))


def main() -> int:
    half, directory = sys.argv[1], Path(sys.argv[2])
    if half == "training":
        train(directory)
    else:
        groups = uvloop.run(generate(directory))
        if half == "recording":
            record(directory, groups)
    return 0


if __name__ == "__main__":
    sys.exit(main())
