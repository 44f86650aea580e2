"""The learner command: start coordinator and snapshot server, wait for rollout servers, train, checkpoint."""

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

import msgspec
from rich.console import Console

from common import messages
from common.canary import canary_prompt
from common.config import parse, write_resolved
from common.events import EventLog
from common.fingerprint import fingerprint_model_config, fingerprint_tokenizer
from common.keys import ServerKeys, ensure_client_key, ensure_server_keys
from common.lifecycle import DedicatedThread, UserError, configure_logging, leave, run_until_stopped
from common.metrics import Measurement, start_metrics_server
from common.snapshot import TensorSpec
from common.wire import curve_keypair
from learner import joining
from learner.algorithms import describe_all
from learner.base_model import BaseModel, describe_adapter
from learner.canary import CanaryMaker, default_canary_every
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.checkpoint_writer import CheckpointWriter, writing_checkpoints
from learner.config import LearnerConfig
from learner.coordinator.client import CoordinatorClient
from learner.evaluations import Evaluations
from learner.launch import launched_place, without_local_rank
from learner.loop import LearnerLoop
from learner.measurements import measure
from learner.observers import StepLog
from learner.plan import coordinator_settings, model_of, train_settings
from learner.progress import Progress, ProgressDisplay
from learner.publisher import Publisher, open_publisher
from learner.rank_orders import LeadingEngine, dismiss, lead
from learner.rank_processes import run_follower, supervise_ranks
from learner.refusals import Refusals
from learner.refused_batches import RefusedBatches
from learner.run_directory import RunDirectory, open_run_directory
from learner.slots import lay_out
from learner.step_metrics import StepMeter
from learner.trackers import Tracker, open_trackers
from learner.training import TrainEngine, TrainSettings

logger = logging.getLogger(__name__)

KNOWN_TABLES = ("learner", "rollout_server")
MAX_ADAPTERS = 16  # versions that an engine is asked to have room for; servers may have more or less
REFRESH_S = 1.0
KEEP_WAITING_S = 5.0  # a rank that died is noticed so soon, or in the step that it leaves undone

EXAMPLES = """\
examples:
  learner --max-staleness 2                          the demo model and task on this machine; prints how to join
  learner --config run.toml --max-staleness 0        synchronous PPO
  learner --config run.toml --listen tcp://0.0.0.0:5557   rollout servers on other nodes join with a key file
  learner --advantage rloo --kl-coefficient 0.05 --kl-in reward    held near the model it starts from
  learner --correction icepop:high=2 --correction veto    masks in place of bounded importance weights
  learner --ranks 8 --zero-stage 2 --dtype bfloat16  8 processes on this machine; started anew when one dies
  learner --evaluate-every-steps 20 --evaluation-samples 4    mean reward and pass@4 on held-out prompts
  torchrun --nproc-per-node 8 -m learner --config run.toml    the same by another launcher; or deepspeed, or srun
  learner --model Qwen/Qwen3-0.6B --data prompts.jsonl --environment python:my_rewards:score

A run directory that holds a checkpoint is resumed from it.
"""


def main(argv: list[str] | None = None) -> NoReturn:
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    config = parse_learner(words)
    place = launched_place(os.environ)
    if place is not None and place.rank > 0:
        configure_logging(f"learner {place.rank}")
        leave(run_follower(config, place))
    configure_logging("learner")
    if place is None and config.ranks > 1:
        leave(run_until_stopped(lambda: supervise_ranks(words, config)))
    leave(run_until_stopped(lambda: learn(config)))


def parse_learner(argv: list[str]) -> LearnerConfig:
    epilog = f"{describe_all()}\n\n{EXAMPLES}"
    return parse(LearnerConfig, argv, program="learner", table="learner", known_tables=KNOWN_TABLES, epilog=epilog)


EngineOpener = Callable[[TrainSettings, Checkpoint | None], TrainEngine]
"""Opens the engine that trains, at the checkpoint if there is one."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The parts of a running learner."""

    config: LearnerConfig
    run: RunDirectory
    settings: TrainSettings
    engine: TrainEngine
    training: DedicatedThread
    checkpoints: CheckpointStore
    events: EventLog
    publisher: Publisher
    coordinator: CoordinatorClient
    trackers: Sequence[Tracker]
    evaluations: Evaluations | None
    tasks: asyncio.TaskGroup


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


@asynccontextmanager
async def open_learner(config: LearnerConfig, open_engine: EngineOpener) -> AsyncIterator[Learner]:
    """Everything that has to be there before the first batch; closed in reverse order, whatever happens."""
    async with AsyncExitStack() as stack:
        run = stack.enter_context(open_run_directory(config.run_dir.absolute()))
        write_resolved(config, run.path / "learner.toml", table="learner")
        events = EventLog(run.path / f"events-learner-{run.lineage}.jsonl", "learner")
        stack.callback(events.close)
        checkpoints = CheckpointStore(run.checkpoints, keep=config.keep_checkpoints)
        checkpoint = checkpoints.latest()
        training = DedicatedThread("training")
        stack.callback(training.close)
        settings = train_settings(config, await training.run(model_of, config, run))
        keys = prepare_keys(config, run)
        engine = await training.run(open_engine, settings, checkpoint)
        if isinstance(engine, LeadingEngine):
            stack.push_async_callback(training.run, engine.close)
        layout = await training.run(lambda: lay_out(engine.snapshot_tensors()))
        publisher = await stack.enter_async_context(
            open_publisher(
                layout,
                base_model=await training.run(base_model_of, settings, engine, layout),
                run_id=run.lineage_id,
                listen=joining.weights_address(config),
                keys=keys,
                private_directory=run.private,
            )
        )
        coordinator = CoordinatorClient(coordinator_settings(config, settings, run, keys), run.private)
        trackers = stack.enter_context(open_trackers(config, run))
        evaluations = evaluations_of(config, coordinator, events, trackers, version=engine.version)
        # A group of its own around the others: what is saved at the end needs the coordinator, whatever ended the rest.
        outer = await stack.enter_async_context(asyncio.TaskGroup())
        supervising = outer.create_task(coordinator.supervise())
        stack.callback(supervising.cancel)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        background = [
            *([tasks.create_task(keep_ranks_waiting(engine, training))] if isinstance(engine, LeadingEngine) else []),
            tasks.create_task(publisher.watch()),
            tasks.create_task(announce_versions(publisher, coordinator, events, evaluations)),
        ]
        yield Learner(
            config=config, run=run, settings=settings, engine=engine, training=training, checkpoints=checkpoints,
            events=events, publisher=publisher, coordinator=coordinator, trackers=trackers, evaluations=evaluations,
            tasks=tasks,
        )  # fmt: skip
        for task in background:
            task.cancel()


def base_model_of(settings: TrainSettings, engine: TrainEngine, layout: Sequence[TensorSpec]) -> BaseModel | None:
    """None where the whole policy is published; layout: of what is."""
    if settings.lora is None or not settings.publishes_adapters:
        return None
    return BaseModel(engine.base_model_tensors, describe_adapter(settings.lora, layout))


def adapter_needs(publisher: Publisher, max_staleness: int) -> messages.AdapterNeeds | None:
    """What engines are to be started for: tokens of max_staleness + 1 versions may be trained, and one is coming."""
    if (adapters := publisher.adapters) is None:
        return None
    versions = min(max_staleness + 2, MAX_ADAPTERS)
    return messages.AdapterNeeds(rank=adapters.rank, target_modules=adapters.target_modules, versions=versions)


def open_default_engine(settings: TrainSettings, checkpoint: Checkpoint | None) -> TrainEngine:
    """DeepSpeed's, on all ranks that were started with this one."""
    from learner.deepspeed_engine import open_ranks, open_resumed_engine  # seconds, and --help needs none of it
    from learner.memory_check import check_memory

    place = launched_place(os.environ)
    ranks, writing = open_ranks(place, timeout_s=settings.engine.rank_timeout_s)
    try:
        check_memory(settings, place)
    except UserError:
        dismiss(ranks)
        raise
    directory = checkpoint.directory if checkpoint is not None else None
    return lead(settings, directory, open_resumed_engine, ranks, writing)


def prepare_keys(config: LearnerConfig, run: RunDirectory) -> ServerKeys | None:
    if not joining.needs_keys(config):
        return None
    keys = ensure_server_keys(run.keys, curve_keypair)
    ensure_client_key(keys, joining.KEY_NAME, curve_keypair)
    return keys


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
        messages.OpenRun(
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


async def announce_versions(
    publisher: Publisher, coordinator: CoordinatorClient, events: EventLog, evaluations: Evaluations | None
) -> None:
    async for ready in publisher.ready_versions():
        events.emit("published", **msgspec.structs.asdict(ready))
        if evaluations is not None:
            await evaluations.published(ready.version)
        await coordinator.published(ready.version)


def evaluations_of(
    config: LearnerConfig,
    coordinator: CoordinatorClient,
    events: EventLog,
    trackers: Sequence[Tracker],
    *,
    version: int,
) -> Evaluations | None:
    """None when nothing is evaluated; version: where this start of the learner begins."""
    settings = config.evaluation_settings
    if settings is None:
        return None
    return Evaluations(settings, coordinator, events, trackers, first_version=version, last_version=config.total_steps)


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


def measurements(learner: Learner, meter: StepMeter) -> Iterator[Measurement]:
    yield from measure(learner.engine, learner.publisher, learner.coordinator)
    yield from meter.measure()
    if learner.evaluations is not None:
        yield from learner.evaluations.measure()


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


async def keep_ranks_waiting(engine: LeadingEngine, training: DedicatedThread) -> None:
    """While there is nothing to do they hear from rank 0 all the same; raises RankLostError when one is gone."""
    while True:
        await asyncio.sleep(KEEP_WAITING_S)
        await training.run(engine.keep_waiting)


async def refresh(display: ProgressDisplay) -> None:
    while True:
        await asyncio.sleep(REFRESH_S)
        display.refresh()


if __name__ == "__main__":
    main()
