"""The rule about batches that break a step, and the learner's loop that follows it with a real engine."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.events import EventLog, read_events
from common.lifecycle import DedicatedThread, UserError
from learner import loop as loop_module
from learner.loop import LearnerLoop
from learner.refusals import Refusals
from learner.refused_batches import RefusedBatches, read_refused_batch
from learner.torch_engine import open_torch_engine
from learner.training import StepResult
from tests.builders_learner import largest_difference, random_groups, some_train_settings, weights_of, with_nan
from tests.models import save_tiny_model

TIMEOUT_S = 60
REFUSED = StepResult(metrics={"reward": 0.5}, refusal="the loss of micro-batch 0 is not finite")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


@pytest.fixture
def events(tmp_path):
    log = EventLog(tmp_path / "events.jsonl", "learner")
    yield log
    log.close()


def the_rule(tmp_path: Path, events: EventLog, rule: str = "skip", most: int = 3) -> Refusals:
    return Refusals(RefusedBatches(tmp_path / "refused"), events, on_nonfinite=rule, max_skipped_steps=most)


def test_stop_stops_at_the_first_and_says_where_the_batch_is_and_how_to_go_on(tmp_path, events):
    error = the_rule(tmp_path, events, "stop").step_refused(4, random_groups(0), REFUSED)
    path = tmp_path / "refused" / "step-000004.ccbatch"
    assert str(error) == (
        "step 4 was not taken: the loss of micro-batch 0 is not finite; its tasks were [0, 1, 2], look at it with "
        f"countercurrent batch {path}; the run stops at the checkpoint of version 4. Started again it meets the same "
        "batch: --on-nonfinite skip goes on without it"
    )
    assert read_refused_batch(path).version == 4


def test_skip_stops_when_one_follows_the_other_and_not_before(tmp_path, events):
    rule = the_rule(tmp_path, events, most=2)
    assert rule.step_refused(0, random_groups(0), REFUSED) is None
    rule.step_taken()
    assert rule.step_refused(2, random_groups(0), REFUSED) is None
    assert "that is max_skipped_steps 2 in a row" in str(rule.step_refused(3, random_groups(0), REFUSED))
    assert repr(rule) == "<Refusals skip, 3 skipped, 2 in a row>"


def test_a_batch_that_cannot_be_kept_is_named_all_the_same(tmp_path, events, caplog):
    (tmp_path / "refused").write_text("in the way")
    assert the_rule(tmp_path, events).step_refused(0, random_groups(0), REFUSED) is None
    assert "and it could not be kept: " in caplog.text


class CoordinatorTwin:
    """Hands out batches by version, and hears which are trained."""

    def __init__(self) -> None:
        self.trained: list[tuple[int, tuple[int, ...]]] = []

    async def take_batch(self, version: int) -> tuple[Any, ...]:
        return random_groups(version, version=version)

    async def step_completed(self, version: int, lease_ids: tuple[int, ...]) -> None:
        self.trained.append((version, lease_ids))


class NoCheckpoints:
    """A CheckpointWriter that writes none."""

    async def begin(self) -> None: ...

    async def done(self) -> None: ...

    def check(self) -> None: ...


async def run_loop(model: str, tmp_path: Path, events: EventLog, monkeypatch, *, rule: str, bad: set[int]) -> Any:
    """Five steps of the loop, of which those that would update the versions in `bad` have a nan."""
    settings = some_train_settings(model, total_steps=5, on_nonfinite=rule)
    engine = open_torch_engine(settings)
    coordinator = CoordinatorTwin()
    built = loop_module.build_batch

    def broken(groups: Any, *, version: int, **rest: Any) -> Any:
        batch = built(groups, version=version, **rest)
        return with_nan(batch, "behavior_logprobs_BT") if version in bad else batch

    monkeypatch.setattr(loop_module, "build_batch", broken)
    training = DedicatedThread("training")
    nothing: Any = None
    loop = LearnerLoop(
        settings=settings, checkpoint_every_steps=100, engine=engine, training=training, coordinator=coordinator,
        publisher=nothing, canaries=nothing, checkpoints=NoCheckpoints(), refusals=the_rule(tmp_path, events, rule),
        events=events, observers=[],
    )  # fmt: skip

    async def nowhere(*_: Any) -> None: ...

    monkeypatch.setattr(loop, "_publish", nowhere)
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await loop.run()
    finally:
        training.close()
    return engine, coordinator


async def test_a_skipped_batch_counts_as_trained_once_and_the_run_goes_on(model, tmp_path, events, monkeypatch):
    engine, coordinator = await run_loop(model, tmp_path, events, monkeypatch, rule="skip", bad={1, 3})
    assert engine.version == 5
    assert [version for version, _ in coordinator.trained] == [1, 2, 3, 4, 5]
    refused = [event for event in read_events([tmp_path / "events.jsonl"]) if event["kind"] == "step_refused"]
    assert [event["version"] for event in refused] == [1, 3]
    assert [read_refused_batch(path).version for path in sorted((tmp_path / "refused").iterdir())] == [1, 3]


async def test_what_was_skipped_leaves_no_trace_in_the_weights(model, tmp_path, events, monkeypatch):
    engine, _ = await run_loop(model, tmp_path, events, monkeypatch, rule="skip", bad={1, 3})
    settings = some_train_settings(model, total_steps=5)
    alone = open_torch_engine(replace(settings, on_nonfinite="skip"))
    for version in range(5):
        groups = random_groups(version, version=version)
        if version in (1, 3):
            alone._version += 1  # as if there never had been a batch
        else:
            batch = loop_module.build_batch(groups, version=version, max_staleness=2, micro_batch_tokens=16384)
            alone.step(batch)
    assert largest_difference(weights_of(engine), weights_of(alone)) == 0.0


async def test_too_many_in_a_row_stop_the_run_after_the_last_is_told(model, tmp_path, events, monkeypatch):
    with pytest.raises(ExceptionGroup) as caught:
        await run_loop(model, tmp_path, events, monkeypatch, rule="skip", bad={1, 2, 3, 4})
    assert caught.group_contains(UserError, match="that is max_skipped_steps 3 in a row")


async def test_stop_leaves_the_version_where_it_was(model, tmp_path, events, monkeypatch):
    with pytest.raises(ExceptionGroup) as caught:
        await run_loop(model, tmp_path, events, monkeypatch, rule="stop", bad={2})
    assert caught.group_contains(UserError, match="step 2 was not taken")
