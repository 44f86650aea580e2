"""A run with several environments on a real coordinator and rollout server over sockets; the learner only counts."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from common.codec import unpack_groups
from common.environments import Environments
from learner.coordinator.messages import Batch, CloseRun, RunOpened, SnapshotPublished, StepCompleted, TakeBatch
from learner.coordinator.mix import Mix
from learner.coordinator.serving import serve as serve_coordinator
from learner.coordinator.settings import CoordinatorSettings
from learner.coordinator.tasks import open_tasks
from rollout_server.environments import environment_at
from tests.builders_coordinator import an_open_run, some_service_settings, some_settings
from tests.builders_coordinator_service import Party
from tests.builders_coordinator_service import a_learner as a_learner_of
from tests.rollout_server.builders_server import V
from tests.rollout_server.builders_server import a_learner as some_snapshots
from tests.rollout_server.builders_server import serve as serve_rollouts

PATIENCE_S = 90.0


class Run:
    """The learner's side: takes batches, and counts the groups of each environment."""

    def __init__(self, learner: Party, snapshots: object, mix: Mix) -> None:
        self.trained = Counter[int]()
        self.version = 0
        self._learner = learner
        self._snapshots = snapshots
        self._mix = mix

    async def step(self) -> None:
        await self._learner.say(TakeBatch(version=self.version))
        batch, payload = await self._learner.hear(Batch)
        groups = unpack_groups(batch.groups, payload)
        self.trained.update(self._mix.environment_of(group.task_id) for group in groups)
        self.version += 1
        lease_ids = tuple(group.lease_id for group in groups)
        await self._learner.say(StepCompleted(version=self.version, lease_ids=lease_ids))
        self._snapshots.published = self.version
        await self._learner.say(SnapshotPublished(version=self.version))


def rules_for(environments: Environments) -> CoordinatorSettings:
    return some_settings(
        groups_per_step=4,
        max_staleness=2,
        max_group_bytes=1 << 16,
        queue_bytes=1 << 30,
        environments=tuple(spec.name for spec in environments.specs),
        environment_weights=tuple(spec.weight for spec in environments.specs),
    )


@asynccontextmanager
async def a_run(environments: Environments, directory: Path, *, step_s: float = 0.0) -> AsyncIterator[Run]:
    """Entered once the rollout server has begun; left when both services have ended well. step_s: s a token takes."""
    directory.mkdir(exist_ok=True)
    (directory / "rows.jsonl").write_text(json.dumps({"prompt": "12+3="}) + "\n")
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(asyncio.timeout(PATIENCE_S))
        snapshots = await stack.enter_async_context(some_snapshots())
        settings = some_service_settings(
            run_id=snapshots.run_id,
            learner_socket=f"ipc://{directory}/learner",
            prompts=str(directory / "rows.jsonl"),
            journal=f"{directory}/journal.sqlite",
            environments=environments.specs,
            rules=rules_for(environments),
        )
        tasks = open_tasks(settings.prompts, seed=0, specs=environments.specs)
        processes = await stack.enter_async_context(asyncio.TaskGroup())
        coordinator = processes.create_task(serve_coordinator(settings, tasks))
        learner = await stack.enter_async_context(a_learner_of(settings))
        run_message = an_open_run(
            model_fingerprint="m", tokenizer_fingerprint="t", max_model_len=64, vocab_size=V,
            weights_address=snapshots.welcome().weights_address,
        )  # fmt: skip
        opened = await learner.ask(run_message, RunOpened)
        await learner.say(SnapshotPublished(version=0))
        entered = {
            spec.name: await stack.enter_async_context(environment_at(spec.url, spec)) for spec in environments.specs
        }
        server = processes.create_task(serve_rollouts(opened.listen_address, directory, entered, step_s=step_s))
        yield Run(learner, snapshots, Mix(settings.rules.environment_weights))
        await learner.say(CloseRun(reason="the run is over"))
        assert await coordinator == 0
        await server
