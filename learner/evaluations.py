"""Evaluations: asks for them as versions are published, and tells everybody what came of each. Beside the loop.

After a crash: an evaluation under way when the coordinator is killed is begun again by the next one. One under way
when the learner is killed is dropped; a version that the resumed run publishes anew is evaluated anew where it is due,
and the later evaluation counts, as it does for steps. A run ends only after the evaluation of its last version, done or
given up: timeout_s after the last step at the latest, whatever servers do.
"""

import asyncio
import logging
from collections.abc import Iterator, Sequence

from common.events import EventLog
from common.metrics import Measurement
from learner.coordinator.client import CoordinatorClient
from learner.evaluation import EVALUATION_METRICS, Evaluation, evaluation_of
from learner.evaluation_settings import EvaluationSettings
from learner.trackers import Tracker

logger = logging.getLogger(__name__)

GRACE_S = 10.0  # beyond the coordinator's own time-out, should that process be killed meanwhile


class Schedule:
    """Which versions are evaluated: the first that is published of each `every`, and the last of the run."""

    def __init__(self, *, every: int, first_version: int, last_version: int) -> None:
        """first_version: where this start of the learner begins; it is due itself when it is a multiple of `every`."""
        self._every = every
        self._last_version = last_version
        self._before = first_version - 1

    def is_due(self, version: int) -> bool:
        """`version` is published. Asked of each version once, in order."""
        if version <= self._before:
            return False
        before, self._before = self._before, version
        return version // self._every > before // self._every or version >= self._last_version


class Evaluations:
    """One at a time. A version that is due meanwhile waits; of several, the newest."""

    def __init__(
        self,
        settings: EvaluationSettings,
        coordinator: CoordinatorClient,
        events: EventLog,
        trackers: Sequence[Tracker],
        *,
        first_version: int,
        last_version: int,
    ) -> None:
        self._settings = settings
        self._coordinator = coordinator
        self._events = events
        self._trackers = trackers
        self._schedule = Schedule(every=settings.every_steps, first_version=first_version, last_version=last_version)
        self._changed = asyncio.Condition()
        self._due: int | None = None
        self._is_running = False
        self.newest: Evaluation | None = None  # that is complete
        self.given_up = 0
        self.skipped = 0  # due, but a newer version was before their turn came

    async def published(self, version: int) -> None:
        """Snapshot `version` can be pulled."""
        if self._schedule.is_due(version):
            async with self._changed:
                if self._due is not None:
                    self.skipped += 1
                    logger.info("version %d is not evaluated: the evaluation before took longer", self._due)
                self._due = version
                self._changed.notify_all()

    async def run(self) -> None:
        """For ever."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._due is not None)
                version, self._due, self._is_running = self._due, None, True
            assert version is not None
            try:
                await self._evaluate(version)
            finally:
                async with self._changed:
                    self._is_running = False
                    self._changed.notify_all()

    async def finish(self, version: int) -> None:
        """The run is at its last version: returns when that is evaluated, or was given up."""
        await self.published(version)
        try:
            async with asyncio.timeout(self._settings.timeout_s + GRACE_S), self._changed:
                await self._changed.wait_for(lambda: self._due is None and not self._is_running)
        except TimeoutError:
            timeout_s = self._settings.timeout_s
            logger.warning("the last evaluation was not done within %g s; the run ends without it", timeout_s)

    async def _evaluate(self, version: int) -> None:
        with self._events.interval("evaluating", version=version):
            report = await self._coordinator.evaluate(version)
        samples, pass_reward = self._settings.samples, self._settings.pass_reward
        evaluation = evaluation_of(report, samples=samples, pass_reward=pass_reward)
        self._events.emit(
            "evaluation",
            version=evaluation.version,
            asked_version=evaluation.asked_version,
            samples=samples,
            temperature=self._settings.temperature,
            complete=evaluation.is_complete,
            reason=evaluation.reason,
            unfinished=evaluation.unfinished,
            failed=dict(evaluation.failed),
            **evaluation.metrics,
        )
        if not evaluation.is_complete:
            self.given_up += 1
            logger.warning("%s; raise evaluation_hold_s or lower evaluation_tasks", evaluation)
            return
        self.newest = evaluation
        logger.info("%s", evaluation)
        for tracker in self._trackers:
            tracker.log(evaluation.version, {f"evaluation/{name}": value for name, value in evaluation.metrics.items()})

    def measure(self) -> Iterator[Measurement]:
        """For the Prometheus endpoint."""
        yield Measurement(name="evaluations_given_up_total", value=self.given_up, help="not completed with one version")
        yield Measurement(name="evaluations_skipped_total", value=self.skipped, help="due while another took too long")
        newest = self.newest
        if newest is None:
            return
        yield Measurement(name="evaluation_version", value=newest.version, help="that was evaluated last")
        for name, value in newest.metrics.items():
            text = EVALUATION_METRICS.get(name, EVALUATION_METRICS["pass_at_1"])
            yield Measurement(name=f"evaluation_{name}", value=value, help=text)
