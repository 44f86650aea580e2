"""SimulatedLearner: takes a batch, trains, publishes, checkpoints; crashes, and goes on from its last checkpoint.

It speaks to its coordinator as learner/loop.py and learner/coordinator/client.py do, and starts another one when that
dies.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from learner.coordinator.ledger import decode_frontier
from learner.coordinator.messages import (
    Batch,
    CheckpointSaved,
    EvaluateVersion,
    EvaluationReport,
    Frontier,
    LearnerToCoordinator,
    OpenRun,
    RunOpened,
    SnapshotPublished,
    StepCompleted,
    TakeBatch,
    TakeFrontier,
)
from tests.simulation import history as seen
from tests.simulation.groups import nonces_of
from tests.simulation.weights import NO_VERSION

if TYPE_CHECKING:
    from tests.simulation.coordinator import SimulatedCoordinator
    from tests.simulation.world import World

LOCAL_S = 0.0005  # a message between the learner and its coordinator
BOOT_S = 0.3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    version: int
    frontier: bytes


class SimulatedLearner:
    """One machine; `lineage` counts its starts. What is scheduled for an earlier start does not happen."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.lineage = 0
        self.is_alive = False
        self.version = self.highest_version = 0
        self.checkpoint: Checkpoint | None = None
        self._run: OpenRun | None = None
        self._published: SnapshotPublished | None = None
        self._asked: dict[type, LearnerToCoordinator] = {}  # by the type of the answer
        self._untold: list[LearnerToCoordinator] = []  # since OpenRun was said, until it is answered
        self._is_open = False
        self._is_publishing = self._is_unpublished = False
        self._stopped_until = 0.0

    def start(self) -> None:
        """As often as it crashed: from the last checkpoint, or from the beginning if there is none."""
        checkpoint = self.checkpoint
        self.lineage += 1
        self.is_alive = True
        self.version = checkpoint.version if checkpoint else 0
        self.world.note(
            seen.LearnerStarted(self.world.clock.now, self.lineage, self.version, is_new_run=checkpoint is None)
        )
        self._published = None
        self._asked.clear()
        self._untold.clear()
        self._is_publishing = self._is_unpublished = False
        self._run = OpenRun(
            version=self.version, model_fingerprint="model-1", tokenizer_fingerprint="tokenizer-1",
            max_model_len=1 << 16, vocab_size=1 << 31, dtype="float32", weights_address="tcp://simulated",
            frontier=checkpoint.frontier if checkpoint else b"",
        )  # fmt: skip
        self._open()
        self._publish()
        self._save(self._take_batch)

    def crash(self) -> None:
        """SIGKILL. Its coordinator notices that its parent is gone, and ends too."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.world.note(seen.LearnerCrashed(self.world.clock.now, self.lineage))
        orphaned_s = self.world.rng.choice([0.0, self.world.rng.uniform(0.0, 0.5)])
        self.world.clock.after(orphaned_s, self.world.end_coordinator, self.world.coordinator)
        self.world.clock.after(orphaned_s + BOOT_S + self.world.rng.uniform(0.0, 2.0), self.start)

    def stop(self, pause_s: float) -> None:
        self._stopped_until = max(self._stopped_until, self.world.clock.now + pause_s)

    def newest_snapshot(self, run_id: str) -> int:
        """What can be pulled of this start of the learner; NO_VERSION when it is gone."""
        is_this = self.is_alive and run_id == self.world.run_id(self.lineage)
        return self.newest_snapshot_at_all() if is_this else NO_VERSION

    def newest_snapshot_at_all(self) -> int:
        return self._published.version if self._published is not None else NO_VERSION

    # --- the conversation with the coordinator ---------------------------------------------------------------------

    def reopen(self) -> None:
        """The coordinator died: another one is told where the run is."""
        if self.is_alive and self.world.coordinator is None:
            self._open()

    def _open(self) -> None:
        assert self._run is not None
        self._is_open = False
        self._untold.clear()
        self.world.open_coordinator(self._run)

    def hear_later(self, coordinator: "SimulatedCoordinator", message: Any, payload: bytes) -> None:
        self.world.clock.after(LOCAL_S, self._hear, self.lineage, coordinator, message, payload)

    def _hear(self, lineage: int, coordinator: "SimulatedCoordinator", message: Any, payload: bytes) -> None:
        if coordinator is not self.world.coordinator or not self._is_running(
            lineage, self._hear, lineage, coordinator, message, payload
        ):
            return
        if isinstance(message, RunOpened):
            self._is_open = True
            for untold in self._untold:
                self._tell(untold)
            if self._published is not None:
                self._tell(self._published)
            for request in self._asked.values():
                self._tell(request)
        elif self._asked.pop(type(message), None) is not None:
            self._answered(message, payload)

    def _answered(self, message: Batch | Frontier | EvaluationReport, payload: bytes) -> None:
        if isinstance(message, EvaluationReport):
            self._evaluated(message)
        elif isinstance(message, Batch):
            training_s = self.world.plan.training_s * (0.5 + self.world.rng.random())
            self.world.clock.after(training_s, self._trained, self.lineage, message, payload)
        else:
            assert message.version == self.version, f"a frontier of {message.version}, at {self.version}"
            saving_s = self.world.plan.saving_s * (0.5 + self.world.rng.random())
            self.world.clock.after(saving_s, self._saved, self.lineage, message)

    def _ask(self, message: LearnerToCoordinator, answer: type) -> None:
        self._asked[answer] = message
        self._tell(message)

    def _tell(self, message: LearnerToCoordinator) -> None:
        coordinator = self.world.coordinator
        if coordinator is None or not self._is_open:
            if isinstance(message, StepCompleted | CheckpointSaved):
                self._untold.append(message)
            return
        self.world.clock.after(LOCAL_S, coordinator.hear_learner, message)

    # --- the loop --------------------------------------------------------------------------------------------------

    def _take_batch(self) -> None:
        self._ask(TakeBatch(version=self.version), Batch)

    def _trained(self, lineage: int, batch: Batch, payload: bytes) -> None:
        if not self._is_running(lineage, self._trained, lineage, batch, payload):
            return
        assert batch.version == self.version, f"a batch for {batch.version}, at {self.version}"
        self._note_trained(batch, payload)
        self.version += 1
        self.highest_version = max(self.highest_version, self.version)
        assert self._run is not None
        self._run = msgspec.structs.replace(self._run, version=self.version)
        leases = tuple(group.lease_id for group in batch.groups)
        self._tell(StepCompleted(version=self.version, lease_ids=leases))
        self._publish()
        if self.version % self.world.plan.checkpoint_every_steps == 0:
            self._save(self._take_batch)
        else:
            self._take_batch()

    def _note_trained(self, batch: Batch, payload: bytes) -> None:
        """With the stale action mask, tokens that are too old get no gradient."""
        rules = self.world.plan.rules
        versions = [
            version for group in batch.groups for trajectory in group.trajectories
            for version, _ in trajectory.version_runs
        ]  # fmt: skip
        if rules.stale_action == "mask":
            versions = [version for version in versions if batch.version - version <= rules.max_staleness]
        self.world.note(
            seen.Trained(
                self.world.clock.now,
                self.lineage,
                batch.version,
                tuple(group.lease_id for group in batch.groups),
                tuple(group.task_id for group in batch.groups),
                nonces_of(batch.groups, payload),
                min(versions, default=batch.version),
                max(versions, default=batch.version),
            )
        )

    def _publish(self) -> None:
        """The newest version; if one is being published, as soon as that is out."""
        if self._is_publishing:
            self._is_unpublished = True
            return
        self._is_publishing, self._is_unpublished = True, False
        publishing_s = self.world.plan.publishing_s * (0.5 + self.world.rng.random())
        self.world.clock.after(publishing_s, self._is_out, self.lineage, self.version)

    def _is_out(self, lineage: int, version: int) -> None:
        if not self._is_running(lineage, self._is_out, lineage, version):
            return
        self._is_publishing = False
        self._published = SnapshotPublished(version=version)
        assert self._run is not None
        self._run = msgspec.structs.replace(self._run, published_version=version)
        self.world.note(seen.Published(self.world.clock.now, lineage, version))
        every = self.world.plan.evaluate_every_steps
        if every and version % every == 0 and EvaluationReport not in self._asked:
            self.world.note(seen.EvaluationAsked(self.world.clock.now, lineage, version))
            self._ask(EvaluateVersion(version=version), EvaluationReport)
        self._tell(self._published)
        if self._is_unpublished:
            self._publish()

    def _evaluated(self, report: EvaluationReport) -> None:
        nonces = tuple(int(task.episodes[0].reward) for task in report.tasks)
        self.world.note(
            seen.EvaluationReported(
                self.world.clock.now, self.lineage, report.asked_version, report.version,
                tuple(task.task_id for task in report.tasks), nonces, sum(report.failed.values()), report.unfinished,
            )
        )  # fmt: skip

    def _save(self, then: Any) -> None:
        self._after_saving = then
        self._ask(TakeFrontier(), Frontier)

    def _saved(self, lineage: int, frontier: Frontier) -> None:
        if not self._is_running(lineage, self._saved, lineage, frontier):
            return
        self.checkpoint = Checkpoint(frontier.version, frontier.frontier)
        state = decode_frontier(frontier.frontier, version=frontier.version, source=self.world.plan.rules.source)
        open_tasks = tuple(task.task_id for task in state.open_tasks)
        self.world.note(
            seen.Checkpointed(
                self.world.clock.now, lineage, state.version, state.next_task_id, open_tasks, tuple(state.parked)
            )
        )
        assert self._run is not None
        self._run = msgspec.structs.replace(self._run, frontier=frontier.frontier)
        self._tell(CheckpointSaved(version=frontier.version))
        self._after_saving()

    def _is_running(self, lineage: int, action: Any, *arguments: Any) -> bool:
        """False: not now; the action is called again when the process runs, if it ever does."""
        if not self.is_alive or lineage != self.lineage:
            return False
        if self.world.clock.now < self._stopped_until:
            self.world.clock.at(self._stopped_until, action, *arguments)
            return False
        return True
