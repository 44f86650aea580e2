"""Refusals: what becomes of batches that broke a step, and when the run has to stop for it."""

import logging
from collections.abc import Sequence

from common.events import EventLog
from common.lifecycle import UserError
from common.trajectory import Group
from learner.loss_settings import OnNonfinite
from learner.refused_batches import RefusedBatch, RefusedBatches
from learner.training import StepResult

logger = logging.getLogger(__name__)


class Refusals:
    """Counts them. One in a run is bad luck; one after the other, the policy itself is broken."""

    def __init__(
        self, files: RefusedBatches, events: EventLog, *, on_nonfinite: OnNonfinite, max_skipped_steps: int
    ) -> None:
        self._files = files
        self._events = events
        self._on_nonfinite = on_nonfinite
        self._max_skipped_steps = max_skipped_steps
        self._in_a_row = 0
        self.skipped_steps = 0

    def __repr__(self) -> str:
        return f"<Refusals {self._on_nonfinite}, {self.skipped_steps} skipped, {self._in_a_row} in a row>"

    def step_taken(self) -> None:
        self._in_a_row = 0

    def step_refused(self, version: int, groups: Sequence[Group], result: StepResult) -> UserError | None:
        """Set the batch aside. Returns why the run stops, None when it goes on without the batch."""
        assert result.refusal is not None
        tasks = [group.task_id for group in groups]
        leases = [group.lease_id for group in groups]
        place = self._set_aside(
            RefusedBatch(version=version, reason=result.refusal, metrics=result.metrics, groups=groups)
        )
        self._events.emit("step_refused", version=version, reason=result.refusal, tasks=tasks, leases=leases)
        what = f"step {version} was not taken: {result.refusal}; its tasks were {tasks}, {place}"
        if self._on_nonfinite == "stop":
            return UserError(
                f"{what}; the run stops at the checkpoint of version {version}. Started again it meets the same batch: "
                "--on-nonfinite skip goes on without it"
            )
        self._in_a_row += 1
        self.skipped_steps += 1
        if self._in_a_row < self._max_skipped_steps:
            logger.warning("%s; it is skipped, the %d. in a row", what, self._in_a_row)
            return None
        return UserError(
            f"{what}; that is max_skipped_steps {self._max_skipped_steps} in a row, so the run stops at version "
            f"{version + 1}. Resume from an older checkpoint, with a lower learning rate or max_grad_norm"
        )

    def _set_aside(self, batch: RefusedBatch) -> str:
        """Where it is, in words; a full disk is no reason to stop a run that would go on."""
        try:
            return f"look at it with countercurrent batch {self._files.write(batch)}"
        except OSError as error:
            return f"and it could not be kept: {error}"
