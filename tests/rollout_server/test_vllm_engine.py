"""The vLLM engine, judged by a transformers forward in float32 on the same weights."""

import asyncio
import multiprocessing
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from common.snapshot import NO_VERSION, SnapshotError
from rollout_server import vllm_engine
from rollout_server.inference import Completion, EngineError, LocalSnapshot, Sampling
from rollout_server.vllm_engine import open_vllm_engine
from rollout_server.vllm_requests import token_versions
from tests.models import END_IDS, FIRST_WORD_ID, VOCAB_SIZE, forward_logprobs, save_tiny_model
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine, tiny_settings

pytestmark = pytest.mark.asyncio(loop_scope="session")

TOLERANCE = 1e-4
TEMPERATURE = 0.8


def a_prompt(num_tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(FIRST_WORD_ID, VOCAB_SIZE, num_tokens, dtype=np.int32)


def a_sampling(seed: int = 0, max_new_tokens: int = 40, temperature: float = TEMPERATURE) -> Sampling:
    return Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


async def hold(live: LiveEngine) -> None:
    """From now on requests are taken but nothing is sampled, so that what a test starts cannot end too early."""
    await live.engine._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)


async def until_calls(live: LiveEngine, num_calls: int) -> None:
    while f", {num_calls} calls" not in repr(live.engine):
        await asyncio.sleep(0)


def logprob_error(live: LiveEngine, prompt: np.ndarray, completion: Completion) -> float:
    """Largest difference to a forward of the very version that is said to have sampled each token."""
    tokens = np.concatenate([prompt, completion.token_ids])
    worst = 0.0
    for version in np.unique(completion.token_versions):
        expected = forward_logprobs(live.models[int(version)], tokens, temperature=TEMPERATURE)[len(prompt) - 1 :]
        by_version = completion.token_versions == version
        worst = max(worst, float(np.abs(expected - completion.logprobs)[by_version].max()))
    return worst


async def test_after_every_update_log_probabilities_are_those_of_the_new_weights(live: LiveEngine):
    for seed in range(3):
        update = await live.load_next()
        assert live.engine.loaded_version == update.version == max(live.models)
        assert 0 < update.pause_s < 5
        prompt = a_prompt(20, seed)
        completion = await live.engine.generate(prompt, a_sampling(seed), "a")
        assert set(completion.token_versions.tolist()) == {update.version}
        assert logprob_error(live, prompt, completion) < TOLERANCE
        assert (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int32, np.float32)


async def test_generations_in_flight_go_on_under_new_weights_and_every_token_tells_its_version(live: LiveEngine):
    await live.load_next()
    prompts = [a_prompt(10 + i, seed=i) for i in range(16)]
    mixed = 0
    for _ in range(10):  # on a busy machine the engine may be done before this process gets to update it
        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(live.engine.generate(prompt, a_sampling(seed, 250), f"r{seed}"))
                for seed, prompt in enumerate(prompts)
            ]
            for _ in range(4):
                # As long as it takes to sample some tokens beside the others.
                await live.engine.generate(a_prompt(5), a_sampling(max_new_tokens=8), "clock")
                await live.load_next()
        for prompt, task in zip(prompts, running, strict=True):
            completion = task.result()
            assert logprob_error(live, prompt, completion) < TOLERANCE
            assert all(earlier <= later for earlier, later in pairwise(completion.token_versions))
            mixed += len(set(completion.token_versions.tolist())) >= 3
        if mixed >= 4:
            return
    pytest.fail(f"only {mixed} completions had tokens of three versions")


@pytest.mark.parametrize("clear_cache", [True, False])
async def test_the_prefix_cache_never_serves_another_versions_weights(
    live: LiveEngine, clear_cache: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(live.engine, "clear_cache", clear_cache)
    prompt = a_prompt(400, seed=7)  # more than one cache block
    for _ in range(3):
        await live.load_next()
        for seed in range(2):
            completion = await live.engine.generate(prompt, a_sampling(seed, 20), "a")
            assert logprob_error(live, prompt, completion) < TOLERANCE


async def test_the_same_seed_samples_the_same_tokens_alone_and_in_a_batch(live: LiveEngine):
    await live.load_next()
    prompt = a_prompt(12)
    alone = await live.engine.generate(prompt, a_sampling(seed=5), "alone")
    async with asyncio.TaskGroup() as tasks:
        batch = [tasks.create_task(live.engine.generate(prompt, a_sampling(seed), "b")) for seed in range(16)]
    assert batch[5].result().token_ids.tolist() == alone.token_ids.tolist()
    assert len({tuple(task.result().token_ids.tolist()) for task in batch}) > 8


async def test_seeds_hold_when_more_prompts_wait_than_one_step_takes(live: LiveEngine):
    await live.load_next()
    prompts = [a_prompt(MAX_MODEL_LEN - 30 - i, seed=i) for i in range(24)]
    async with asyncio.TaskGroup() as tasks:
        batch = [tasks.create_task(live.engine.generate(p, a_sampling(9, 12), "p")) for p in prompts]
        await live.engine.generate(a_prompt(5), a_sampling(max_new_tokens=4), "clock")
        await live.load_next()  # all prompts are computed once more
    for prompt, task in zip(prompts, batch, strict=True):
        assert logprob_error(live, prompt, task.result()) < TOLERANCE
        alone = await live.engine.generate(prompt, a_sampling(9, 12), "alone")
        if task.result().token_versions.min() == live.engine.loaded_version:
            assert task.result().token_ids.tolist() == alone.token_ids.tolist()


async def test_the_whole_distribution_is_sampled_whatever_the_models_generation_config_suggests(live: LiveEngine):
    await live.load_next()  # generation_config.json says top_k=4, top_p=0.3 and a repetition penalty
    prompt = a_prompt(12)
    async with asyncio.TaskGroup() as tasks:
        one_token = [tasks.create_task(live.engine.generate(prompt, a_sampling(seed, 1), "o")) for seed in range(200)]
    assert len({int(task.result().token_ids[0]) for task in one_token}) > 8


async def test_at_temperature_zero_every_token_is_the_likeliest_and_has_a_finite_log_probability(live: LiveEngine):
    update = await live.load_next()
    prompt = a_prompt(12)
    greedy = [await live.engine.generate(prompt, a_sampling(seed, temperature=0.0), f"g{seed}") for seed in (1, 2)]
    assert greedy[0].token_ids.tolist() == greedy[1].token_ids.tolist()
    tokens = np.concatenate([prompt, greedy[0].token_ids])
    expected = forward_logprobs(live.models[update.version], tokens, temperature=1.0)[len(prompt) - 1 :]
    assert np.abs(expected - greedy[0].logprobs).max() < TOLERANCE
    first_logprobs = [
        forward_logprobs(live.models[update.version], np.append(prompt, token_id))[-1] for token_id in range(VOCAB_SIZE)
    ]
    assert greedy[0].token_ids[0] == np.argmax(first_logprobs)


async def test_a_completion_terminates_at_any_end_token_and_is_truncated_otherwise(live: LiveEngine):
    await live.load_next()
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(live.engine.generate(a_prompt(8, s), a_sampling(s, 60), "e")) for s in range(160)]
    completions = [task.result() for task in running]
    ends = set(END_IDS)
    for completion in completions:
        assert not ends & set(completion.token_ids[:-1].tolist())
        assert completion.terminated == (int(completion.token_ids[-1]) in ends)
        assert completion.terminated or completion.token_ids.size == 60
    assert {int(c.token_ids[-1]) for c in completions if c.terminated} == ends
    assert any(not completion.terminated for completion in completions)


async def test_a_completion_is_truncated_at_the_context_length(live: LiveEngine):
    await live.load_next()
    prompt = a_prompt(MAX_MODEL_LEN - 3)
    completion = await live.engine.generate(prompt, a_sampling(max_new_tokens=50), "a")
    assert completion.terminated or completion.token_ids.size == 3
    assert logprob_error(live, prompt, completion) < TOLERANCE


async def test_token_logprobs_are_the_forwards_even_for_a_prompt_in_the_prefix_cache(live: LiveEngine):
    await live.load_next()
    tokens = a_prompt(300, seed=3)
    await live.engine.generate(tokens, a_sampling(max_new_tokens=2), "fills the cache")
    for _ in range(2):
        measured = await live.engine.token_logprobs(tokens)
        expected = forward_logprobs(live.models[live.engine.loaded_version], tokens)
        assert measured.shape == expected.shape
        assert np.abs(measured - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("prompt", "sampling", "complaint"),
    [
        (a_prompt(MAX_MODEL_LEN), a_sampling(), f"1 to {MAX_MODEL_LEN - 1} tokens"),
        (a_prompt(0), a_sampling(), "got 0"),
        (np.array([VOCAB_SIZE], np.int32), a_sampling(), f"0 to {VOCAB_SIZE - 1}"),
        (np.array([-1], np.int32), a_sampling(), "got -1"),
        (a_prompt(3), a_sampling(max_new_tokens=0), "max_new_tokens"),
        (a_prompt(3), a_sampling(temperature=0.001), "temperature"),
        (a_prompt(3), a_sampling(temperature=float("nan")), "temperature"),
    ],
)
async def test_an_impossible_request_is_refused_with_its_value(live: LiveEngine, prompt, sampling, complaint):
    with pytest.raises(ValueError, match=complaint):
        await live.engine.generate(prompt, sampling, "a")


async def test_a_snapshot_of_another_model_is_refused_and_leaves_the_engine_as_it_was(live: LiveEngine):
    await live.load_next()
    version = live.engine.loaded_version
    whole = live.next_snapshot()
    tensors = whole.manifest.tensors
    renamed = type(tensors[3])(name="model.other.weight", shape=tensors[3].shape, dtype="float32", offset=0)
    halved = type(tensors[3])(name=tensors[3].name, shape=tensors[3].shape, dtype="bfloat16", offset=0)
    flat = type(tensors[0])(name=tensors[0].name, shape=(VOCAB_SIZE * 64,), dtype="float32", offset=0)
    for wrong, complaint in [
        (tensors[:-1], f"lacks {tensors[-1].name}"),
        ((*tensors, renamed), "has model.other.weight"),
        ((flat, *tensors[1:]), "has shape"),
        ((*tensors[:3], halved, *tensors[4:]), "is bfloat16, the engine runs in float32"),
    ]:
        manifest = msgspec.structs.replace(whole.manifest, tensors=wrong)
        with pytest.raises(SnapshotError, match=complaint):
            await live.engine.load_weights(LocalSnapshot(manifest=manifest, path=whole.path))
    truncated = live.directory / "truncated"
    truncated.write_bytes(whole.path.read_bytes()[:-1])
    with pytest.raises(SnapshotError, match="bytes"):
        await live.engine.load_weights(LocalSnapshot(manifest=whole.manifest, path=truncated))
    assert live.engine.loaded_version == version
    completion = await live.engine.generate(a_prompt(9), a_sampling(), "a")
    assert logprob_error(live, a_prompt(9), completion) < TOLERANCE


@pytest.mark.parametrize("lacking", ["bytes", "a tensor"])
async def test_after_a_failed_update_nothing_is_generated_until_one_succeeds(
    live: LiveEngine, lacking: str, monkeypatch: pytest.MonkeyPatch
):
    await live.load_next()
    snapshot = live.next_snapshot()
    broken = LocalSnapshot(manifest=snapshot.manifest, path=live.directory / "cut")
    broken.path.write_bytes(snapshot.path.read_bytes()[:-100])
    if lacking == "a tensor":
        manifest = msgspec.structs.replace(snapshot.manifest, tensors=snapshot.manifest.tensors[:-1])
        broken = LocalSnapshot(manifest=manifest, path=snapshot.path)
    await hold(live)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(live.engine.generate(a_prompt(9, 1), a_sampling(1), "running"))
        await until_calls(live, 1)
        with monkeypatch.context() as patch:
            patch.setattr(vllm_engine, "check_snapshot", lambda *_: None)
            with pytest.raises(EngineError, match=f"snapshot {snapshot.manifest.version} cannot be applied"):
                await live.engine.load_weights(broken)
        with pytest.raises(EngineError, match="not applied completely"):
            await live.engine.generate(a_prompt(9), a_sampling(), "refused")
        assert not running.done()
        await live.engine.load_weights(snapshot)
        after = await live.engine.generate(a_prompt(9), a_sampling(), "after")
    assert logprob_error(live, a_prompt(9), after) < TOLERANCE
    assert logprob_error(live, a_prompt(9, 1), running.result()) < TOLERANCE


async def test_a_call_during_an_update_waits_and_is_sampled_by_the_new_weights(live: LiveEngine):
    await live.load_next()
    async with asyncio.TaskGroup() as tasks:
        update = tasks.create_task(live.load_next())
        while "not applied" not in repr(live.engine):
            await asyncio.sleep(0)
        late = tasks.create_task(live.engine.generate(a_prompt(9), a_sampling(), "late"))
    assert set(late.result().token_versions.tolist()) == {update.result().version}


async def test_cancelling_a_generate_aborts_it_in_the_engine(live: LiveEngine):
    await live.load_next()
    await hold(live)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(live.engine.generate(a_prompt(9), a_sampling(), "cancelled"))
        await until_calls(live, 1)
        running.cancel()
    assert running.cancelled()
    assert ", 0 calls" in repr(live.engine)
    assert live.engine._llm.get_num_unfinished_requests() == 0
    await live.load_next()


async def test_a_healthy_engine_passes_its_health_check(live: LiveEngine):
    await live.engine.check_health(timeout_s=10)


async def test_nothing_is_generated_before_the_first_snapshot_and_close_ends_what_runs(disposable: LiveEngine):
    assert disposable.engine.loaded_version == NO_VERSION
    with pytest.raises(EngineError, match="load_weights comes first"):
        await disposable.engine.generate(a_prompt(5), a_sampling(), "early")
    await disposable.load_next()
    pids = disposable.engine.process_ids()
    await hold(disposable)
    running = [asyncio.ensure_future(disposable.engine.generate(a_prompt(9, s), a_sampling(s), "r")) for s in range(8)]
    await until_calls(disposable, 8)
    async with asyncio.timeout(20):
        await disposable.engine.close()
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(outcome, EngineError) for outcome in outcomes)
    assert not any(is_alive(pid) for pid in pids)
    await disposable.engine.close()
    for call in (
        disposable.engine.generate(a_prompt(5), a_sampling(), "late"),
        disposable.load_next(),
        disposable.engine.check_health(1),
    ):
        with pytest.raises(EngineError):
            await call


async def test_a_stalled_engine_fails_its_health_check_and_a_killed_one_fails_what_runs(disposable: LiveEngine):
    await disposable.load_next()
    (pid,) = disposable.engine.process_ids()
    os.kill(pid, signal.SIGSTOP)
    running = [asyncio.ensure_future(disposable.engine.generate(a_prompt(9, s), a_sampling(s), "r")) for s in range(4)]
    running.append(asyncio.ensure_future(disposable.load_next()))
    await until_calls(disposable, 5)
    with pytest.raises(EngineError, match=r"did not answer within 0.2 s"):
        await disposable.engine.check_health(timeout_s=0.2)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(15):
        outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(outcome, EngineError) for outcome in outcomes)
    for call in (
        disposable.engine.generate(a_prompt(5), a_sampling(), "late"),
        disposable.load_next(),
        disposable.engine.check_health(5),
    ):
        with pytest.raises(EngineError):
            await call


async def test_closing_a_stalled_engine_ends_every_call_on_it(disposable: LiveEngine):
    await disposable.load_next()
    (pid,) = disposable.engine.process_ids()
    os.kill(pid, signal.SIGINT)  # as a terminal sends it to the whole group: no reason to end
    await disposable.engine.check_health(timeout_s=5)
    os.kill(pid, signal.SIGSTOP)
    calls = [
        asyncio.ensure_future(call)
        for call in (
            disposable.engine.generate(a_prompt(9), a_sampling(), "r"),
            disposable.engine.check_health(60),
            disposable.load_next(),
            disposable.engine.generate(a_prompt(9), a_sampling(), "beside the update"),
            disposable.engine.token_logprobs(a_prompt(9)),
        )
    ]
    await until_calls(disposable, 4)  # the last one waits for the update
    async with asyncio.timeout(20):
        await disposable.engine.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, EngineError) for outcome in outcomes)
    await until_dead(pid)


async def test_opening_can_be_cancelled_and_leaves_no_process(tmp_path):
    before = child_pids()
    opening = asyncio.ensure_future(open_vllm_engine(tiny_settings(save_tiny_model(tmp_path, tied=True))).__aenter__())
    while not (started := child_pids() - before):
        await asyncio.sleep(0.01)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    for pid in started:
        await until_dead(pid)


async def test_a_killed_server_leaves_no_engine_behind(tmp_path):
    program = f"""
import asyncio, os, signal
from rollout_server.vllm_engine import open_vllm_engine
from rollout_server.vllm_start import VllmSettings

async def main():
    async with open_vllm_engine(VllmSettings(model={str(save_tiny_model(tmp_path, tied=True))!r})) as engine:
        print(*engine.process_ids(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    with (tmp_path / "output").open("w+") as output:
        server = await asyncio.create_subprocess_exec(sys.executable, "-c", program, stdout=output)
        async with asyncio.timeout(60):
            assert await server.wait() == -signal.SIGKILL
        pid = int((tmp_path / "output").read_text().split()[-1])
    await until_dead(pid)


async def test_a_model_that_does_not_exist_is_refused_by_name(tmp_path):
    with pytest.raises((ValueError, OSError), match="no-such-model"):
        async with open_vllm_engine(tiny_settings(tmp_path / "no-such-model")):
            pass


@pytest.mark.parametrize(
    "spans",
    [[], [("3", 0, 4)], [("3", 0, 2), ("4", 3, 5)], [("default", 0, 5)], [("3", 0, 6)], [("3", 1, 5)]],
)
async def test_tokens_of_no_or_doubtful_version_are_an_engine_error(spans):
    with pytest.raises(EngineError, match="span"):
        token_versions([SimpleNamespace(version=v, start=start, end=end) for v, start, end in spans], 5)


def child_pids() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


async def until_dead(pid: int) -> None:
    async with asyncio.timeout(15):
        while is_alive(pid):
            await asyncio.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"
