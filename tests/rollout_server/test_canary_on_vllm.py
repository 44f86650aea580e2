"""The canary on real vLLM: its workers go wrong in the ways that really happen, under load."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest

from common.canary import TOLERANCES, canary_prompt, make_canary
from common.events import EventLog
from common.lifecycle import UserError
from rollout_server.inference import LocalSnapshot
from rollout_server.snapshot_transport import ArrivedSnapshot, WeightTarget
from rollout_server.vllm_engine import VllmEngine
from rollout_server.weight_receiver import WeightReceiver
from tests.models import VOCAB_SIZE, a_tiny_model, forward_logprobs, write_snapshot
from tests.rollout_server.conftest import MAX_MODEL_LEN, LiveEngine, set_fault
from tests.rollout_server.test_vllm_engine import a_prompt, a_sampling

pytestmark = pytest.mark.asyncio(loop_scope="session")

PATIENCE_S = 60.0
PROMPT = canary_prompt(VOCAB_SIZE, MAX_MODEL_LEN)
FAULTS = (
    "vLLM packs the tied output layer",
    "a flipped bit after the digest",
    "a skipped tensor",
    "a wrong base",
)


@dataclass
class LocalVersions:
    """A transport whose versions are there already; each has weights unlike any before, and a canary."""

    directory: Path
    target: WeightTarget = field(default_factory=WeightTarget)
    forgotten: int = 0

    def bind(self, target: WeightTarget, *others: object) -> "LocalVersions":
        self.target = target
        return self

    @asynccontextmanager
    async def next_version(self, dealer: object) -> AsyncIterator[ArrivedSnapshot]:
        version = self.target.published_version
        model, path = a_tiny_model(version, tied=True), self.directory / f"{version}"
        canary = make_canary(PROMPT.tolist(), forward_logprobs(model, PROMPT), TOLERANCES["float32"])
        manifest = msgspec.structs.replace(write_snapshot(path, model, version=version), canary=canary)
        yield ArrivedSnapshot(manifest=manifest, path=path, form="whole", num_bytes=manifest.num_bytes)

    def forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None: ...


@pytest.fixture(scope="session")
def engine(faulty: LiveEngine) -> VllmEngine:
    return faulty.engine


@contextmanager
def a_receiver(engine: VllmEngine, directory: Path) -> Iterator[tuple[WeightReceiver, LocalVersions]]:
    versions = LocalVersions(directory)
    with (
        closing(EventLog(directory / "events.jsonl", "rollout_server")) as events,
        closing(WeightReceiver(engine, events, transport=versions.bind)) as receiver,
    ):
        yield receiver, versions


async def keep_busy(engine: VllmEngine) -> None:
    for number in itertools.count():
        await engine.generate(a_prompt(10, number), a_sampling(number, 50), f"load {number}")


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_vllm_computes_with_other_weights_than_it_was_given_is_found_and_repaired(
    engine: VllmEngine, tmp_path: Path, fault: str
):
    with a_receiver(engine, tmp_path) as (receiver, versions):
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            await receiver.follow("test")
            await receiver.announce(0)
            doubts: list[str] = []

            async def on_doubt(doubt: str) -> None:
                doubts.append(doubt)
                await set_fault(engine, "none")

            running = [tasks.create_task(receiver.run(None, on_doubt=on_doubt))]
            await receiver.wait_for_version(0)
            running += [tasks.create_task(keep_busy(engine)) for _ in range(4)]
            await set_fault(engine, fault)
            await receiver.announce(1)
            await receiver.wait_for_version(1)
            assert versions.forgotten == 1
            assert receiver.canaries_failed == 1
            logprobs = await engine.token_logprobs(PROMPT)
            for task in running:
                task.cancel()
    assert ["with version 1 loaded" in doubt for doubt in doubts] == [True]
    np.testing.assert_allclose(logprobs, forward_logprobs(a_tiny_model(1, tied=True), PROMPT), atol=1e-4)


async def test_vllms_own_packing_of_the_output_layer_cannot_be_repaired_and_ends_the_server(
    engine: VllmEngine, tmp_path: Path
):
    with a_receiver(engine, tmp_path) as (receiver, _):
        await receiver.follow("test")
        await receiver.announce(0)
        await set_fault(engine, "vLLM packs the tied output layer")
        with pytest.raises(UserError, match="computes something else than the learner with the same weights"):
            async with asyncio.timeout(PATIENCE_S):
                await receiver.run(None)
        await set_fault(engine, "none")


async def test_what_wrong_weights_have_cached_is_not_read_by_the_right_ones_of_the_same_version(
    engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "clear_cache", False)
    prompt = a_prompt(400)  # more than one cache block
    with a_receiver(engine, tmp_path) as (receiver, _):
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            await receiver.follow("test")
            await receiver.announce(0)

            async def on_doubt(doubt: str) -> None:
                await engine.generate(prompt, a_sampling(0, 4), "with wrong weights")
                await set_fault(engine, "none")

            running = tasks.create_task(receiver.run(None, on_doubt=on_doubt))
            await receiver.wait_for_version(0)
            await set_fault(engine, "a skipped tensor")
            await receiver.announce(1)
            await receiver.wait_for_version(1)
            assert receiver.canaries_failed == 1
            completion = await engine.generate(prompt, a_sampling(0, 4, temperature=1.0), "with right weights")
            running.cancel()
    tokens = np.concatenate([prompt, completion.token_ids])
    expected = forward_logprobs(a_tiny_model(1, tied=True), tokens)[len(prompt) - 1 :]
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


async def test_what_a_former_life_of_the_run_has_cached_is_not_read_by_versions_of_the_same_numbers(
    engine: VllmEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine, "clear_cache", False)
    prompt, path = a_prompt(400), tmp_path / "snapshot"
    for seed in (1, 2):  # two lives; versions 10 and 11 of the second have nothing to do with those of the first
        for version in (10, 11):
            model = a_tiny_model(100 * seed + version, tied=True)
            await engine.load_weights(LocalSnapshot(manifest=write_snapshot(path, model, version=version), path=path))
            completion = await engine.generate(prompt, a_sampling(0, 4, temperature=1.0), f"{seed} {version}")
            tokens = np.concatenate([prompt, completion.token_ids])
            expected = forward_logprobs(model, tokens)[len(prompt) - 1 :]
            np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


async def test_a_canary_does_not_wait_for_what_vllm_has_queued(engine: VllmEngine, tmp_path: Path):
    with a_receiver(engine, tmp_path) as (receiver, _):
        async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as tasks:
            await receiver.follow("test")
            await receiver.announce(0)
            running = tasks.create_task(receiver.run(None))
            await receiver.wait_for_version(0)
            waiting = [
                tasks.create_task(engine.generate(a_prompt(8, number), a_sampling(number, 40), f"queued {number}"))
                for number in range(1000)
            ]
            while f", {len(waiting)} calls" not in repr(engine):
                await asyncio.sleep(0)
            await receiver.announce(1)
            await receiver.wait_for_version(1)
            unfinished = sum(not task.done() for task in waiting)
            for task in (running, *waiting):
                task.cancel()
    assert unfinished > len(waiting) / 2
