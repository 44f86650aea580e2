"""Adapters in real vLLM, each token held against a transformers and PEFT forward of the version that it names."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from transformers import GPT2Config, GPT2LMHeadModel

from common.lifecycle import UserError
from common.snapshot import SnapshotError
from rollout_server.inference import Completion, EngineError, WeightUpdate
from rollout_server.vllm_adapters import adapter_token_versions
from rollout_server.vllm_engine import VllmEngine, open_vllm_engine
from rollout_server.vllm_start import AdapterSlots
from tests.adapters import RANK, TARGETS, an_adapted_model, write_adapter, write_base_model
from tests.models import VOCAB_SIZE, a_model, forward_logprobs, save_model
from tests.rollout_server.conftest import tiny_settings
from tests.rollout_server.test_vllm_engine import TOLERANCE, a_prompt, a_sampling, logprob_error

pytestmark = pytest.mark.asyncio(loop_scope="session")

VERSIONS = 3  # that the engine has room for


@dataclass(kw_only=True)
class AdaptedEngine:
    """An engine with a base model, and the adapted models that it was given, by version."""

    engine: VllmEngine
    directory: Path
    base: Any
    models: dict[int, Any] = field(default_factory=dict)
    _versions: Any = field(default_factory=itertools.count)

    async def load_base(self) -> None:
        self.manifest = (snapshot := write_base_model(self.directory / "base", self.base)).manifest
        await self.engine.load_weights(snapshot)

    async def load_next(self, **adapter: Any) -> WeightUpdate:
        version = next(self._versions)
        self.models[version] = an_adapted_model(self.base, 100 + version, **adapter)
        path = self.directory / f"adapter-{version}"
        return await self.engine.load_weights(write_adapter(path, self.models[version], self.manifest, version=version))

    async def in_vllm(self) -> set[int]:
        """Numbers of the adapters that it holds."""
        return set(await self.engine._llm.list_loras())


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def adapted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AdaptedEngine]:
    directory = tmp_path_factory.mktemp("adapted")
    base = a_model(7, tied=True)
    slots = AdapterSlots(rank=RANK, target_modules=TARGETS, versions=VERSIONS)
    settings = replace(tiny_settings(save_model(directory / "model", base)), adapters=slots, max_num_seqs=16)
    async with open_vllm_engine(settings) as engine:
        adapted = AdaptedEngine(engine=engine, directory=directory, base=base)
        await adapted.load_base()
        yield adapted


async def hold(adapted: AdaptedEngine) -> None:
    await adapted.engine._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)


async def until_running(adapted: AdaptedEngine, num_calls: int) -> None:
    while f", {num_calls} calls" not in repr(adapted.engine):
        await asyncio.sleep(0)


async def test_each_version_samples_as_its_own_adapter_says_and_the_canary_is_asked_of_the_newest(
    adapted: AdaptedEngine,
):
    prompt = a_prompt(200, seed=3)  # more than one block of the prefix cache
    for seed in range(2):
        update = await adapted.load_next()
        assert (adapted.engine.loaded_version, update.pause_s > 0) == (update.version, True)
        for repeat in range(2):
            completion = await adapted.engine.generate(prompt, a_sampling(seed + repeat, 20), "a")
            assert set(completion.token_versions.tolist()) == {update.version}
            assert logprob_error(adapted, prompt, completion) < TOLERANCE
        logprobs = await adapted.engine.token_logprobs(prompt)
        np.testing.assert_allclose(logprobs, forward_logprobs(adapted.models[update.version], prompt), atol=TOLERANCE)


async def test_running_requests_end_on_the_version_that_they_began_with_beside_new_ones(adapted: AdaptedEngine):
    first = (await adapted.load_next()).version
    prompt = a_prompt(30)
    await hold(adapted)
    async with asyncio.TaskGroup() as tasks:
        old = tasks.create_task(adapted.engine.generate(prompt, a_sampling(1, 60), "old"))
        await until_running(adapted, 1)
        second = (await adapted.load_next()).version
        new = tasks.create_task(adapted.engine.generate(prompt, a_sampling(1, 60), "new"))
        await until_running(adapted, 2)
        await adapted.engine._llm.resume_generation()
    for task, version in ((old, first), (new, second)):
        assert set(task.result().token_versions.tolist()) == {version}
        assert logprob_error(adapted, prompt, task.result()) < TOLERANCE


async def test_no_more_versions_are_held_than_there_is_room_for_and_the_next_waits_for_a_request_to_end(
    adapted: AdaptedEngine, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    oldest = (await adapted.load_next()).version
    prompt = a_prompt(9)
    await hold(adapted)
    async with asyncio.TaskGroup() as tasks:
        running = []
        for number in range(VERSIONS):
            running.append(tasks.create_task(adapted.engine.generate(prompt, a_sampling(number, 30), f"{number}")))
            await until_running(adapted, number + 1)
            if number < VERSIONS - 1:
                await adapted.load_next()
        assert len(await adapted.in_vllm()) == VERSIONS
        waiting = tasks.create_task(adapted.load_next())
        while f"waits for requests of version {oldest} to end: {VERSIONS} are in use" not in caplog.text:
            await asyncio.sleep(0)
        running[0].cancel()
        update = await waiting
        assert len(await adapted.in_vllm()) == VERSIONS
        await adapted.engine._llm.resume_generation()
    for task in running[1:]:
        assert logprob_error(adapted, prompt, task.result()) < TOLERANCE
    assert await adapted.engine.generate(prompt, a_sampling(), "after")
    await adapted.load_next()
    assert len(await adapted.in_vllm()) == 2  # the newest, and what was the newest until it was there
    assert update.version == adapted.engine.loaded_version - 1


async def test_versions_come_while_requests_of_all_lengths_run_and_every_token_is_its_versions(adapted: AdaptedEngine):
    await adapted.load_next()
    done: list[tuple[np.ndarray, Completion]] = []

    async def keep_busy(seed: int) -> None:
        for number in range(4):
            prompt = a_prompt(10 + seed, 100 * seed + number)
            done.append((prompt, await adapted.engine.generate(prompt, a_sampling(number, 10 + 9 * seed), "load")))

    async with asyncio.TaskGroup() as tasks:
        load = [tasks.create_task(keep_busy(seed)) for seed in range(6)]
        while not all(task.done() for task in load):
            await adapted.load_next()
            await adapted.engine.generate(a_prompt(5), a_sampling(max_new_tokens=2), "clock")
    assert all(len(set(completion.token_versions.tolist())) == 1 for _, completion in done)
    assert len({int(completion.token_versions[0]) for _, completion in done}) > 2
    assert max(logprob_error(adapted, *one) for one in done) < TOLERANCE


async def test_an_adapter_of_fewer_layers_leaves_the_others_as_the_base_has_them(adapted: AdaptedEngine):
    await adapted.load_next(rank=2, alpha=3.0, targets=("v_proj", "down_proj"))
    prompt = a_prompt(12)
    completion = await adapted.engine.generate(prompt, a_sampling(2), "a")
    assert logprob_error(adapted, prompt, completion) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_model": bytes(16)}, "is an adapter of base model 0000.*, the engine holds "),
        ({"rank": 8}, "adapter of rank 8 in .*; this engine was started for rank 4 in q_proj, "),
        ({"target_modules": ("q_proj", "lm_head")}, "adapter of rank 4 in q_proj, lm_head; this engine was started"),
        ({"target_modules": ("q_proj",)}, "has an adapter for model.layers.0.mlp.down_proj, which is none of"),
        ({"rank": 3}, r"lora_A.weight is float32 of shape \(4, .*expected float32 of \(3, "),
    ],
)
async def test_what_cannot_be_added_is_refused_and_the_engine_goes_on_as_it_was(
    adapted: AdaptedEngine, changes: dict[str, Any], complaint: str
):
    before = (await adapted.load_next()).version
    snapshot = write_adapter(
        adapted.directory / "odd", adapted.models[before], adapted.manifest, version=10_000, **changes
    )
    with pytest.raises(SnapshotError, match=complaint):
        await adapted.engine.load_weights(snapshot)
    completion = await adapted.engine.generate(a_prompt(9), a_sampling(), "a")
    assert set(completion.token_versions.tolist()) == {before}


async def test_another_base_waits_for_running_requests_and_nothing_is_sampled_until_it_has_an_adapter(
    adapted: AdaptedEngine,
):
    version = (await adapted.load_next()).version
    prompt = a_prompt(20)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(adapted.engine.generate(prompt, a_sampling(4, 60), "old"))
        await until_running(adapted, 1)
        former = adapted.models[version]
        adapted.base = a_model(8, tied=True)
        await adapted.load_base()
        assert running.done()
    adapted.models[version] = former
    assert logprob_error(adapted, prompt, running.result()) < TOLERANCE
    with pytest.raises(EngineError, match="the base model is loaded, and no adapter yet"):
        await adapted.engine.generate(prompt, a_sampling(), "early")
    await adapted.load_next()
    completion = await adapted.engine.generate(prompt, a_sampling(4), "new")
    assert logprob_error(adapted, prompt, completion) < TOLERANCE


async def test_an_adapter_for_an_engine_that_was_started_without_is_refused(live, adapted: AdaptedEngine):
    await adapted.load_next()
    snapshot = write_adapter(
        adapted.directory / "odd", next(iter(adapted.models.values())), adapted.manifest, version=9
    )
    with pytest.raises(SnapshotError, match="is an adapter, and this engine was started without room for any"):
        await live.engine.load_weights(snapshot)


async def test_a_rank_that_vllm_does_not_take_is_refused_before_it_is_started(tmp_path: Path):
    slots = AdapterSlots(rank=513, target_modules=TARGETS, versions=2)
    settings = replace(tiny_settings(save_model(tmp_path / "model", a_model(0, tied=True))), adapters=slots)
    with pytest.raises(UserError, match="rank 513, vLLM takes at most 512: set lora_rank lower, or lora_snapshots ="):
        async with open_vllm_engine(settings):
            pass


async def test_a_version_number_that_comes_again_reads_nothing_that_its_former_weights_have_cached(
    adapted: AdaptedEngine, monkeypatch: pytest.MonkeyPatch
):
    salts: list[str] = []
    generate = adapted.engine._llm.generate

    def watched(prompt: dict[str, Any], *rest: Any, **settings: Any) -> Any:
        salts.append(prompt["cache_salt"])
        return generate(prompt, *rest, **settings)

    monkeypatch.setattr(adapted.engine._llm, "generate", watched)
    prompt = a_prompt(200, seed=5)  # more than one block of the prefix cache
    for seed in range(2):
        adapted.models[20_000] = an_adapted_model(adapted.base, seed)
        path = adapted.directory / f"again-{seed}"
        await adapted.engine.load_weights(write_adapter(path, adapted.models[20_000], adapted.manifest, version=20_000))
        completion = await adapted.engine.generate(prompt, a_sampling(seed), "a")
        assert logprob_error(adapted, prompt, completion) < TOLERANCE
    assert len(set(salts)) == 2


async def test_an_architecture_for_which_vllm_has_no_adapters_is_refused_before_it_is_started(tmp_path: Path):
    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "n_positions": 1024}
    model = save_model(tmp_path / "model", GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **sizes)))
    slots = AdapterSlots(rank=RANK, target_modules=("c_attn",), versions=2)
    says = 'vLLM has no adapters for GPT2LMHeadModel: set lora_snapshots = "merged" on the learner'
    with pytest.raises(UserError, match=says):
        async with open_vllm_engine(replace(tiny_settings(model), adapters=slots)):
            pass


async def test_tokens_of_two_base_models_are_no_version():
    assert adapter_token_versions(np.array([1, 1], np.int32), 7).tolist() == [7, 7]
    with pytest.raises(EngineError, match="tokens of version 7 were sampled with more than one base model"):
        adapter_token_versions(np.array([1, 2], np.int32), 7)
