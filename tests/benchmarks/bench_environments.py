"""How busy the engine is with episodes whose environment takes a second a step, over how busy single turns keep it.

256 episodes at once on real vLLM with a tiny model, for a while each: one turn each with a reward at once, then up to
eight turns with a second of waiting after each. Both are measured in turns, so that a noisy machine disturbs both.

Busy is the share of the time in which the engine had a request to work on. Tokens per second say more: episodes that
wait are not in the batch, so how many they cost depends on how long a turn takes beside the wait.
"""

import argparse
import asyncio
import itertools
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, Self

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import PreTrainedTokenizerFast

from common.environments import EnvironmentSettings
from common.events import EventLog
from common.messages import Lease
from rollout_server.busy import MeteredEngine
from rollout_server.environments.environment import Row, Said, StepResult
from rollout_server.episodes import EpisodeRunner
from rollout_server.inference import LocalSnapshot
from rollout_server.vllm_engine import open_vllm_engine
from rollout_server.vllm_start import VllmSettings
from tests.models import a_tiny_model, save_tiny_model, write_snapshot

EPISODES = 256
TURN_TOKENS = 64
MAX_MODEL_LEN = 1024
STEP_S = 1.0
WARM_UP_S = 5.0


class Waits:
    """Every step takes step_s and says two words, until `turns` were taken."""

    def __init__(self, url: str, *, turns: int, step_s: float) -> None:
        self.url = url
        self.settings = EnvironmentSettings()
        self._turns = turns
        self._step_s = step_s

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator["Waits.Episode"]:
        yield self.Episode(row, self._turns, self._step_s)

    class Episode:
        def __init__(self, row: Row, turns: int, step_s: float) -> None:
            self._row = row
            self._left = turns
            self._step_s = step_s

        async def reset(self) -> Any:
            return self._row.prompt

        async def step(self, said: Said) -> StepResult:
            await asyncio.sleep(self._step_s)
            self._left -= 1
            return StepResult(reward=0.0, done=self._left == 0, observation=" w20 w21")


async def one_after_the_other(runner: EpisodeRunner, environment: str, numbers: "itertools.count[int]") -> None:
    while True:
        number = next(numbers)
        row = json.dumps({"prompt": "w7 w8 w9"}).encode()
        await runner.run(
            Lease(
                lease_id=number, task_id=number, environment=environment, row=row, group_size=1, seed=number,
                min_version=0, max_group_bytes=1 << 30,
            )
        )  # fmt: skip


async def measured(
    runner: EpisodeRunner, engine: MeteredEngine, environment: str, seconds: float
) -> Mapping[str, float]:
    """Share of the time with a request running, and tokens per second, once all episodes have begun."""
    numbers = itertools.count()
    async with asyncio.TaskGroup() as episodes:
        running = [episodes.create_task(one_after_the_other(runner, environment, numbers)) for _ in range(EPISODES)]
        await asyncio.sleep(WARM_UP_S)
        began_s, busy_s, tokens = time.time(), engine.busy_s, engine.generated_tokens
        await asyncio.sleep(seconds)
        elapsed_s = time.time() - began_s
        result = {
            "busy": (engine.busy_s - busy_s) / elapsed_s,
            "tokens": (engine.generated_tokens - tokens) / elapsed_s,
        }
        for task in running:
            task.cancel()
    return result


async def main(seconds: float, rounds: int) -> None:
    directory = Path(tempfile.mkdtemp())
    model = save_tiny_model(directory / "model", tied=True)
    settings = VllmSettings(
        model=str(model), dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=EPISODES, kv_cache_bytes=1 << 28
    )
    environments = {
        "single": Waits("single", turns=1, step_s=0.0),
        "slow": Waits("slow", turns=8, step_s=STEP_S),
    }
    async with open_vllm_engine(settings) as opened:
        snapshot = directory / "snapshot"
        manifest = write_snapshot(snapshot, a_tiny_model(1000, tied=True), version=0)
        await opened.load_weights(LocalSnapshot(manifest=manifest, path=snapshot))
        engine = MeteredEngine(opened, EventLog(directory / "events.jsonl", "rollout_server"))
        runner = EpisodeRunner(
            engine, environments, PreTrainedTokenizerFast.from_pretrained(model), temperature=1.0,
            max_new_tokens=TURN_TOKENS, max_model_len=MAX_MODEL_LEN, wait_for_version=at_once,
        )  # fmt: skip
        results: dict[str, list[Mapping[str, float]]] = {name: [] for name in environments}
        for _ in range(rounds):
            for name, of_this in results.items():
                of_this.append(await measured(runner, engine, name, seconds))
    for what in ("busy", "tokens"):
        single, slow = (median(result[what] for result in results[name]) for name in ("single", "slow"))
        print(f"{what:7} single turns {single:10.3f}   1 s steps {slow:10.3f}   ratio {slow / single:.3f}")


async def at_once(version: int) -> None:
    del version


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--seconds", type=float, default=20.0)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    asyncio.run(main(options.seconds, options.rounds))
