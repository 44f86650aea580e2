"""The parts of a learner that have to be there before its first batch, opened in order and closed in reverse."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import msgspec

from common.config import write_resolved
from common.events import EventLog
from common.keys import ServerKeys, ensure_client_key, ensure_server_keys
from common.lifecycle import DedicatedThread, UserError
from common.snapshot import TensorSpec
from common.wire import curve_keypair
from learner import joining
from learner.base_model import BaseModel, describe_adapter
from learner.checkpoint import Checkpoint, CheckpointStore
from learner.config import LearnerConfig
from learner.coordinator.client import CoordinatorClient
from learner.evaluations import Evaluations
from learner.launch import launched_place
from learner.plan import coordinator_settings, model_of, train_settings
from learner.publisher import Publisher, open_publisher
from learner.rank_orders import LeadingEngine, dismiss, lead
from learner.run_directory import RunDirectory, open_run_directory
from learner.slots import lay_out
from learner.trackers import Tracker, open_trackers
from learner.training import TrainEngine, TrainSettings

KEEP_WAITING_S = 5.0  # a rank that died is noticed so soon, or in the step that it leaves undone

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


async def keep_ranks_waiting(engine: LeadingEngine, training: DedicatedThread) -> None:
    """While there is nothing to do they hear from rank 0 all the same; raises RankLostError when one is gone."""
    while True:
        await asyncio.sleep(KEEP_WAITING_S)
        await training.run(engine.keep_waiting)
