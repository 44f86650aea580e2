import asyncio
import math
from pathlib import Path

import numpy as np
import pytest

from common.snapshot import NO_VERSION, TensorSpec, build_manifest
from rollout_server.inference import EngineError, InferenceEngine, LocalSnapshot, Sampling
from rollout_server.table_engine import TABLE_TENSOR, TableEngine

V = 5
EOS_ID = 0
NEVER = -1e9


def an_engine(*, max_model_len: int = 100, step_s: float = 0.0) -> TableEngine:
    return TableEngine(vocab_size=V, max_model_len=max_model_len, eos_id=EOS_ID, step_s=step_s)


def a_snapshot(table_VV: np.ndarray, path: Path, *, version: int = 0, name: str = TABLE_TENSOR) -> LocalSnapshot:
    data = table_VV.astype("<f4").tobytes()
    path.write_bytes(data)
    tensors = (TensorSpec(name, table_VV.shape, "float32", 0),)
    return LocalSnapshot(manifest=build_manifest(memoryview(data), tensors, run_id="run", version=version), path=path)


def a_random_table(seed: int) -> np.ndarray:
    table_VV = np.random.default_rng(seed).normal(size=(V, V))
    table_VV[:, EOS_ID] = NEVER
    return table_VV


def a_table_that_always_says(token_id: int) -> np.ndarray:
    table_VV = np.full((V, V), NEVER)
    table_VV[:, token_id] = 0.0
    return table_VV


def sampling(seed: int = 0, *, temperature: float = 1.0, max_new_tokens: int = 20) -> Sampling:
    return Sampling(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)


PROMPT = np.array([1, 2], dtype=np.int32)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
async def test_log_probabilities_are_those_of_the_table_written_as_loops(tmp_path, temperature):
    engine: InferenceEngine = an_engine()
    table = a_random_table(0).astype(np.float32)
    await engine.load_weights(a_snapshot(table, tmp_path / "a"))
    completion = await engine.generate(PROMPT, sampling(temperature=temperature), "r")
    last = 2
    for token_id, logprob in zip(completion.token_ids, completion.logprobs, strict=True):
        partition = sum(math.exp(table[last, other] / temperature) for other in range(V))
        assert logprob == pytest.approx(table[last, token_id] / temperature - math.log(partition), abs=1e-5)
        last = token_id


async def test_token_logprobs_are_those_of_generation_at_temperature_one(tmp_path):
    engine = an_engine()
    await engine.load_weights(a_snapshot(a_random_table(0), tmp_path / "a"))
    completion = await engine.generate(PROMPT, sampling(), "r")
    logprobs = await engine.token_logprobs(np.concatenate([PROMPT, completion.token_ids]))
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs[1:], completion.logprobs, atol=1e-6)


async def test_tokens_are_sampled_as_often_as_their_probability_says(tmp_path):
    engine = an_engine(max_model_len=20_001)
    table = a_random_table(1)
    await engine.load_weights(a_snapshot(table, tmp_path / "a"))
    completion = await engine.generate(PROMPT[:1], sampling(3, max_new_tokens=20_000), "r")
    pairs = np.zeros((V, V))
    np.add.at(pairs, (completion.token_ids[:-1], completion.token_ids[1:]), 1)
    expected = np.exp(table) / np.exp(table).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(pairs[1:] / pairs[1:].sum(axis=-1, keepdims=True), expected[1:], atol=0.03)


async def test_the_same_seed_gives_the_same_tokens_alone_or_among_others(tmp_path):
    engine = an_engine()
    await engine.load_weights(a_snapshot(a_random_table(0), tmp_path / "a"))
    alone = await engine.generate(PROMPT, sampling(7), "r")
    among = await asyncio.gather(*(engine.generate(PROMPT, sampling(seed), str(seed)) for seed in range(10)))
    np.testing.assert_array_equal(alone.token_ids, among[7].token_ids)
    assert len({completion.token_ids.tobytes() for completion in among}) == 10


async def test_generation_ends_at_the_end_of_sequence_token_or_is_cut(tmp_path):
    engine = an_engine(max_model_len=10)
    await engine.load_weights(a_snapshot(a_table_that_always_says(EOS_ID), tmp_path / "a"))
    completion = await engine.generate(PROMPT, sampling(), "r")
    assert (completion.token_ids.tolist(), completion.terminated) == ([EOS_ID], True)
    await engine.load_weights(a_snapshot(a_table_that_always_says(3), tmp_path / "b"))
    completion = await engine.generate(PROMPT, sampling(max_new_tokens=4), "r")
    assert (completion.token_ids.tolist(), completion.terminated) == ([3] * 4, False)
    completion = await engine.generate(PROMPT, sampling(max_new_tokens=40), "r")
    assert (completion.token_ids.size, completion.terminated) == (8, False)


async def test_weights_change_between_two_tokens_of_a_running_request(tmp_path):
    engine = an_engine(step_s=0.005)
    await engine.load_weights(a_snapshot(a_table_that_always_says(1), tmp_path / "a", version=3))
    async with asyncio.TaskGroup() as tasks:
        request = tasks.create_task(engine.generate(PROMPT, sampling(max_new_tokens=30), "r"))
        await asyncio.sleep(0.03)
        await engine.load_weights(a_snapshot(a_table_that_always_says(2), tmp_path / "b", version=4))
    completion = request.result()
    assert set(completion.token_versions.tolist()) == {3, 4}
    np.testing.assert_array_equal(completion.token_ids, np.where(completion.token_versions == 3, 1, 2))
    assert engine.loaded_version == 4


@pytest.mark.parametrize(("table", "name"), [(np.zeros((V, V + 1)), TABLE_TENSOR), (np.zeros((V, V)), "other.weight")])
async def test_a_snapshot_of_another_model_is_refused_and_changes_nothing(tmp_path, table, name):
    engine = an_engine()
    with pytest.raises(EngineError, match=r"no table.weight of shape \(5, 5\)"):
        await engine.load_weights(a_snapshot(table, tmp_path / "a", name=name))
    assert engine.loaded_version == NO_VERSION
    assert repr(engine) == "<TableEngine version -1, 0 running>"


async def test_a_snapshot_file_that_is_too_short_is_refused(tmp_path):
    snapshot = a_snapshot(np.zeros((V, V)), tmp_path / "a")
    snapshot.path.write_bytes(b"short")
    with pytest.raises(EngineError, match="ends within"):
        await an_engine().load_weights(snapshot)


@pytest.mark.parametrize("prompt", [[], [V], [-1], [1] * 100])
async def test_a_prompt_that_does_not_fit_is_refused(prompt):
    with pytest.raises(ValueError, match=r"token ids|the prompt has"):
        await an_engine().generate(np.array(prompt, dtype=np.int32), sampling(), "r")


async def test_closing_ends_running_requests():
    engine = an_engine(step_s=0.001)

    async def close() -> None:
        await engine.close()
        await engine.close()

    request, _ = await asyncio.gather(engine.generate(PROMPT, sampling(), "r"), close(), return_exceptions=True)
    assert isinstance(request, EngineError)
    with pytest.raises(EngineError, match="closed"):
        await engine.check_health(1.0)
