"""Changes written into the parameters of real vLLM: bit for bit what a whole snapshot makes of them, under load."""

import asyncio
import copy
import hashlib
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from common.snapshot import SnapshotManifest
from rollout_server.inference import Completion, EngineError, LocalSnapshot, WeightUpdate
from rollout_server.local_changes import LocalChanges
from tests.models import VOCAB_SIZE, write_snapshot
from tests.rollout_server.conftest import LiveEngine, set_fault
from tests.rollout_server.test_vllm_engine import TOLERANCE, a_prompt, a_sampling, hold, logprob_error, until_calls

pytestmark = pytest.mark.asyncio(loop_scope="session")

PADDED_VOCAB_SIZE = 128  # vLLM pads to multiples of 64


def changed(model: Qwen2ForCausalLM, share: float, seed: int) -> Qwen2ForCausalLM:
    """A model some of whose elements are others, of every tensor at least the last if any."""
    new, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in new.parameters():
            is_changed = torch.rand(parameter.shape, generator=generator) < share
            is_changed.view(-1)[-1] = share > 0
            parameter += is_changed * 0.02 * torch.randn(parameter.shape, generator=generator)
    return new


def write_changes(
    path: Path, manifest: SnapshotManifest, old: Qwen2ForCausalLM, new: Qwen2ForCausalLM, base_version: int
) -> LocalChanges:
    before = dict(old.named_parameters())

    def changes() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, parameter in new.named_parameters():
            words, words_before = (each.detach().view(torch.int32).flatten() for each in (parameter, before[name]))
            places = np.flatnonzero((words != words_before).numpy())
            yield name, places, words.numpy()[places]

    return LocalChanges.write(path, manifest, base_version, changes())


async def load_changed(live: LiveEngine, share: float, *, whole: bool = False) -> WeightUpdate:
    """The next version: the engine's own, with a share of its elements changed."""
    base = live.engine.loaded_version
    version = max(live.models) + 1
    live.models[version] = changed(live.models[base], share, version)
    path = live.directory / "changed"
    manifest = write_snapshot(path, live.models[version], version=version)
    changes = write_changes(live.directory / "changes", manifest, live.models[base], live.models[version], base)
    next(live._versions)
    return await live.engine.load_weights(
        LocalSnapshot(manifest=manifest, path=path, changes=None if whole else changes)
    )


def fused_parameters(model: Qwen2ForCausalLM) -> dict[str, torch.Tensor]:
    """What vLLM makes of a Qwen2: q, k and v in one, gate and up in one, words padded with zeros."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            fused[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif ".gate_proj." in name:
            fused[name.replace("gate_proj", "gate_up_proj")] = torch.cat([tensor, tensors[name.replace("gate", "up")]])
        elif tensor.shape[0] == VOCAB_SIZE:
            padding = torch.zeros(PADDED_VOCAB_SIZE - VOCAB_SIZE, tensor.shape[1])
            fused[name] = torch.cat([tensor, padding])
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            fused[name] = tensor
    return fused


async def assert_bit_for_bit(live: LiveEngine) -> None:
    """Every byte of every parameter in vLLM's worker is that of the loaded version."""
    [found] = await live.engine._llm.compute_weight_checksums()
    expected = fused_parameters(live.models[live.engine.loaded_version])
    digests = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in expected.items()}
    assert {name.rpartition(":")[2]: digest for name, digest in found.items()} == digests


async def keep_busy(live: LiveEngine, seed: int, done: list[tuple[np.ndarray, Completion]]) -> None:
    for number in itertools.count():
        prompt = a_prompt(10, 1000 * seed + number)
        done.append((prompt, await live.engine.generate(prompt, a_sampling(number, 60), f"load {seed} {number}")))


@asynccontextmanager
async def under_load(live: LiveEngine, done: list[tuple[np.ndarray, Completion]]) -> AsyncIterator[None]:
    load = [asyncio.ensure_future(keep_busy(live, seed, done)) for seed in range(4)]
    try:
        yield
    finally:
        for task in load:
            task.cancel()
        await asyncio.wait(load)


async def test_after_any_mix_of_deltas_and_fulls_under_load_every_bit_and_every_token_is_the_loaded_versions(
    live: LiveEngine,
):
    await live.load_next()
    done: list[tuple[np.ndarray, Completion]] = []
    randomness = np.random.default_rng(0)
    shares = [0.0, 0.0001, 0.001, 0.01, 0.05, 0.5]
    async with under_load(live, done):
        for number in range(40):
            share = shares[randomness.integers(len(shares))]
            if number % 10 == 9:
                assert not (await live.load_next()).in_place
            else:
                assert (await load_changed(live, share)).in_place == (share < 0.1)
            await assert_bit_for_bit(live)
            await live.engine.generate(a_prompt(5), a_sampling(max_new_tokens=4), "clock")
    assert len(done) > 8
    assert sum(len(set(completion.token_versions.tolist())) > 1 for _, completion in done) > 4
    assert max(logprob_error(live, *one) for one in done) < TOLERANCE


async def test_half_written_changes_keep_the_engine_paused_until_a_whole_snapshot_is_loaded(
    faulty: LiveEngine,
):
    version = (await faulty.load_next()).version
    prompt = a_prompt(9)
    await hold(faulty)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(faulty.engine.generate(prompt, a_sampling(1), "running"))
        await until_calls(faulty, 1)
        await set_fault(faulty.engine, "the changes are written by half")
        with pytest.raises(
            EngineError, match=f"snapshot {version + 1} cannot be applied.*the other half cannot be read"
        ):
            await load_changed(faulty, 0.05)
        assert f"snapshot {version + 1} was not applied completely" in repr(faulty.engine)
        with pytest.raises(EngineError, match="not applied completely: load one that is whole"):
            await faulty.engine.generate(prompt, a_sampling(), "refused")
        with pytest.raises(EngineError, match="not applied completely"):
            await faulty.engine.token_logprobs(prompt)
        assert not running.done()
        await set_fault(faulty.engine, "none")
        assert not (await load_changed(faulty, 0.01)).in_place  # a delta of the version that half of it is
    assert logprob_error(faulty, prompt, running.result()) < TOLERANCE
    assert set(running.result().token_versions.tolist()) == {version + 2}
    await assert_bit_for_bit(faulty)
    assert (await load_changed(faulty, 0.01)).in_place
    await assert_bit_for_bit(faulty)
