"""Requests that keep an engine busy for so many steps, and updates that come between them, for bench_apply."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from rollout_server.inference import Completion, Sampling
from rollout_server.vllm_engine import VllmEngine
from tests.benchmarks.apply_versions import Versions
from tests.models import FIRST_WORD_ID, VOCAB_SIZE, forward_logprobs

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Processor time of a process since its start, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


@dataclass(kw_only=True)
class Window:
    """What one run of the load took."""

    wall_s: float = 0.0
    engine_cpu_s: float = 0.0
    server_cpu_s: float = 0.0  # of the process that the updates come from: this one
    done: list[tuple[np.ndarray, Completion]] = field(default_factory=list)
    pauses_s: list[float] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(completion.token_ids.size for _, completion in self.done)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s

    @property
    def cpu_s_per_token(self) -> float:
        return self.engine_cpu_s / self.num_tokens

    def cpu_s_per_update(self, control: "Window") -> tuple[float, float]:
        """(the engine's, this process's) beyond what a control without updates took for as many tokens."""
        share, num_updates = self.num_tokens / control.num_tokens, len(self.pauses_s)
        engine = (self.engine_cpu_s - share * control.engine_cpu_s) / num_updates
        return engine, (self.server_cpu_s - share * control.server_cpu_s) / num_updates


class Updates:
    """Has an engine step through versions, up and down again; knows which weights each version number stands for."""

    def __init__(self, engine: VllmEngine, versions: Versions) -> None:
        self._engine = engine
        self._versions = versions
        self._sets: dict[int, int] = {}  # by version number
        self._at = 0
        self._by = 1

    async def begin(self) -> None:
        version = self._engine.loaded_version + 1
        await self._engine.load_weights(self._versions.whole(0, version))
        self._sets[version] = self._at = 0

    async def next(self) -> float:
        """Seconds of pause."""
        if not 0 <= self._at + self._by < self._versions.num_sets:
            self._by = -self._by
        base, new = self._engine.loaded_version, self._at + self._by
        update = await self._engine.load_weights(self._versions.step(self._at, new, base))
        assert update.in_place
        self._sets[update.version], self._at = new, new
        return update.pause_s

    def errors(self, prompt: np.ndarray, completion: Completion, *, versions_behind: int = 0) -> np.ndarray:
        """|recorded - forward| of each token, by the version that is said to have sampled it, or one before that."""
        tokens = np.concatenate([prompt, completion.token_ids])
        found = np.empty(completion.token_ids.size)
        for version in np.unique(completion.token_versions):
            weights = self._sets[max(int(version) - versions_behind, min(self._sets))]
            expected = forward_logprobs(self._versions.model(weights), tokens)[prompt.size - 1 :]
            is_its = completion.token_versions == version
            found[is_its] = np.abs(expected - completion.logprobs)[is_its]
        return found


@dataclass(frozen=True, kw_only=True)
class Load:
    """Requests that start together and end by their length."""

    requests: int
    prompt_tokens: int
    new_tokens: int

    def __str__(self) -> str:
        return f"{self.requests} requests of {self.prompt_tokens} + {self.new_tokens} tokens"

    async def run(self, engine: VllmEngine, updates: Updates, *, steps_per_update: int | None, turn: int) -> Window:
        """turn: makes prompts that no cache holds."""
        window = Window()
        shape = (self.requests, self.prompt_tokens)
        prompts = np.random.default_rng(turn + 1).integers(FIRST_WORD_ID, VOCAB_SIZE, shape, dtype=np.int32)
        [pid] = engine.process_ids()
        start_cpu_s, start_server_s, start_s = cpu_s(pid), time.process_time(), time.perf_counter()
        next_update = steps_per_update or self.new_tokens
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._generate(engine, prompt, seed)) for seed, prompt in enumerate(prompts)]
            async for step in self._steps(engine, prompts[0]):
                if steps_per_update is not None and step >= next_update:
                    window.pauses_s.append(await updates.next())
                    next_update += steps_per_update
        window.wall_s = time.perf_counter() - start_s
        window.engine_cpu_s = cpu_s(pid) - start_cpu_s
        window.server_cpu_s = time.process_time() - start_server_s
        window.done = [(prompt, task.result()) for prompt, task in zip(prompts, running, strict=True)]
        return window

    async def _generate(self, engine: VllmEngine, prompt: np.ndarray, seed: int) -> Completion:
        sampling = Sampling(temperature=1.0, max_new_tokens=self.new_tokens, seed=seed)
        return await engine.generate(prompt, sampling, f"load {seed}")

    async def _steps(self, engine: VllmEngine, prompt: np.ndarray) -> AsyncIterator[int]:
        """Counts the engine's steps: one more request, whose tokens are seen as they come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=self.new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        step = 0
        async for output in engine._llm.generate({"prompt_token_ids": prompt.tolist()}, params, "clock"):
            step += len(output.outputs[0].token_ids)
            yield step
