"""What is told of each step: to the event log, and to the trackers that were asked for."""

from collections import Counter
from collections.abc import Sequence

from common.events import EventLog
from common.staleness import token_staleness
from common.trajectory import Group
from learner.trackers import Tracker
from learner.training import StepResult


class StepLog:
    """Writes every step, with the histogram of its tokens' staleness."""

    def __init__(self, events: EventLog, trackers: Sequence[Tracker]) -> None:
        self._events = events
        self._trackers = trackers

    def step_completed(self, version: int, groups: tuple[Group, ...], result: StepResult) -> None:
        histogram = staleness_histogram(groups, version - 1)
        self._events.emit(
            "step",
            step=version,
            leases=[group.lease_id for group in groups],
            tasks=[group.task_id for group in groups],
            staleness_histogram=histogram,
            **result.metrics,
        )
        for tracker in self._trackers:
            tracker.log(version, result.metrics)


def staleness_histogram(groups: Sequence[Group], trained_version: int) -> dict[str, int]:
    """Sampled tokens by their age, in optimizer steps, at the step that updated `trained_version`."""
    counts: Counter[int] = Counter()
    for group in groups:
        for trajectory in group.trajectories:
            ages = token_staleness(trajectory.token_versions, current=trained_version)[trajectory.loss_mask]
            counts.update(ages.tolist())
    return {str(age): counts[age] for age in sorted(counts)}
