"""A learner from its first line to its last: open the run, train beside all that watches it, export the policy."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from rich.console import Console

from common import messages
from common.canary import canary_prompt
from common.fingerprint import fingerprint_model_config, fingerprint_tokenizer
from common.lifecycle import UserError
from common.metrics import Measurement, start_metrics_server
from learner import joining
from learner.canary import CanaryMaker, default_canary_every
from learner.checkpoint_writer import CheckpointWriter, writing_checkpoints
from learner.config import LearnerConfig
from learner.coordinator.messages import OpenRun
from learner.loop import LearnerLoop
from learner.measurements import measure
from learner.observers import StepLog
from learner.parts import EngineOpener, Learner, open_default_engine, open_learner
from learner.progress import Progress, ProgressDisplay
from learner.publisher import Publisher
from learner.refusals import Refusals
from learner.refused_batches import RefusedBatches
from learner.step_metrics import StepMeter

logger = logging.getLogger(__name__)

MAX_ADAPTERS = 16  # versions that an engine is asked to have room for; servers may have more or less
REFRESH_S = 1.0


async def learn(config: LearnerConfig, *, open_engine: EngineOpener | None = None) -> int:
    """Train to the end; open_engine: what trains, in place of DeepSpeed."""
    async with open_learner(config, open_engine or open_default_engine) as learner:
        facts = await open_run(learner)
        await train(learner, facts)
        path = learner.run.huggingface / f"step-{learner.engine.version:06d}"
        await learner.training.run(learner.engine.export_huggingface, path)
        learner.events.emit("export", path=str(path))
        logger.info("finished; the policy is in %s", path)
        reason = f"{learner.engine.version} steps are trained"
        await learner.coordinator.close_run(reason)
    return 0


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What rollout servers must agree with, and know of the model."""

    model_fingerprint: str
    tokenizer_fingerprint: str
    max_model_len: int
    vocab_size: int


async def open_run(learner: Learner) -> ModelFacts:
    """Open the run with the coordinator, and say how to join it; returns what its servers' engines will be like."""
    settings, checkpoint = learner.settings, learner.checkpoints.latest()
    facts = await learner.training.run(model_facts, settings.model)
    facts = replace(facts, max_model_len=joining.checked_model_len(learner.config, facts.max_model_len))
    address = await learner.coordinator.open_run(
        OpenRun(
            version=learner.engine.version,
            model_fingerprint=facts.model_fingerprint,
            tokenizer_fingerprint=facts.tokenizer_fingerprint,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            dtype=settings.dtype,
            adapters=adapter_needs(learner.publisher, settings.max_staleness),
            weights_address=await learner.publisher.listening(),
            frontier=checkpoint.state.frontier if checkpoint is not None else b"",
        )
    )
    learner.run.remember_address(address)
    logger.info("rollout servers join with:\n\n    %s\n", joining.join_command(learner.config, learner.run, address))
    return facts


def model_facts(model: str) -> ModelFacts:
    """What rollout servers must agree with; raises UserError when the tokenizer is missing."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} has no tokenizer: {error}") from error
    return ModelFacts(
        fingerprint_model_config(config.to_dict()),
        fingerprint_tokenizer(tokenizer),
        int(getattr(config, "max_position_embeddings", 1 << 20)),
        int(config.vocab_size),
    )


def adapter_needs(publisher: Publisher, max_staleness: int) -> messages.AdapterNeeds | None:
    """What engines are to be started for: tokens of max_staleness + 1 versions may be trained, and one is coming."""
    if (adapters := publisher.adapters) is None:
        return None
    versions = min(max_staleness + 2, MAX_ADAPTERS)
    return messages.AdapterNeeds(rank=adapters.rank, target_modules=adapters.target_modules, versions=versions)


async def train(learner: Learner, facts: ModelFacts) -> None:
    """The loop, with everything that watches it."""
    config, events, evaluations = learner.config, learner.events, learner.evaluations
    async with AsyncExitStack() as stack:
        progress = progress_of(learner)
        checkpoints = await stack.enter_async_context(writing_checkpoints(checkpoint_writer_of(learner)))
        refusals = refusals_of(learner)
        meter = StepMeter(refusals)
        loop = LearnerLoop(
            settings=learner.settings,
            checkpoint_every_steps=config.checkpoint_every_steps,
            engine=learner.engine,
            training=learner.training,
            coordinator=learner.coordinator,
            publisher=learner.publisher,
            canaries=canaries_of(config, learner.publisher, facts),
            checkpoints=checkpoints,
            refusals=refusals,
            events=events,
            observers=[StepLog(events, learner.trackers), progress, meter],
            at_the_end=evaluations.finish if evaluations is not None else None,
        )
        if config.metrics_listen is not None:
            stack.enter_context(start_metrics_server(config.metrics_listen, lambda: measurements(learner, meter)))
        display = stack.enter_context(ProgressDisplay(progress, Console()))
        beside = [refresh(display), *([evaluations.run()] if evaluations is not None else [])]
        running = [learner.tasks.create_task(work) for work in beside]
        try:
            await loop.run()
        finally:
            for task in running:
                task.cancel()


def canaries_of(config: LearnerConfig, publisher: Publisher, facts: ModelFacts) -> CanaryMaker:
    every = config.canary_every
    return CanaryMaker(
        every=default_canary_every(publisher.num_parameters) if every is None else every,
        prompt=canary_prompt(facts.vocab_size, facts.max_model_len),
        dtype=config.dtype,
        tolerance=config.canary_tolerance,
    )


def refusals_of(learner: Learner) -> Refusals:
    return Refusals(
        RefusedBatches(learner.run.refused),
        learner.events,
        on_nonfinite=learner.config.on_nonfinite,
        max_skipped_steps=learner.config.max_skipped_steps,
    )


def progress_of(learner: Learner) -> Progress:
    evaluations = learner.evaluations
    return Progress(
        total_steps=learner.config.total_steps,
        queue_groups=learner.config.queue_capacity,
        waited_s=lambda: learner.coordinator.waited_s,
        status=lambda: learner.coordinator.status,
        version=learner.engine.version,
        published=lambda: learner.publisher.newest,
        evaluated=lambda: evaluations.newest if evaluations is not None else None,
    )


def checkpoint_writer_of(learner: Learner) -> CheckpointWriter:
    return CheckpointWriter(
        model=learner.settings.model,
        engine=learner.engine,
        training=learner.training,
        coordinator=learner.coordinator,
        checkpoints=learner.checkpoints,
        events=learner.events,
    )


def measurements(learner: Learner, meter: StepMeter) -> Iterator[Measurement]:
    yield from measure(learner.engine, learner.publisher, learner.coordinator)
    yield from meter.measure()
    if learner.evaluations is not None:
        yield from learner.evaluations.measure()


async def refresh(display: ProgressDisplay) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        display.refresh()
