"""Batches: finished groups on their way to the optimizer: which are trained next, and what would be late then."""

from collections import Counter

from learner.coordinator.deadlines import Deadlines
from learner.coordinator.recovery import Recovered
from learner.coordinator.replay_queue import FinishedGroup, QueuedGroup, ReplayQueue
from learner.coordinator.settings import CoordinatorSettings


class Batches:
    """The replay queue, the batches delivered before a restart, and the deadlines of all that is open."""

    def __init__(self, settings: CoordinatorSettings, recovered: Recovered) -> None:
        self.settings = settings
        self.queue = ReplayQueue(max_groups=settings.queue_groups, max_bytes=settings.queue_bytes)
        self.recorded = dict(recovered.batches)  # version -> its batch, to be delivered again as it was
        self.delivered: tuple[QueuedGroup, ...] = ()  # the batch from the queue that the learner has now
        self.deadlines = Deadlines(settings.groups_per_step)
        for group in recovered.queued:
            self.queue.put_back(group)
            self.deadlines.add(self._deadline(group))
        for version, batch in self.recorded.items():
            for _ in batch:
                self.deadlines.add(version)

    def __len__(self) -> int:
        """Groups that were accepted and are not trained yet."""
        return len(self.queue) + sum(map(len, self.recorded.values()))

    def task_ids(self) -> tuple[int, ...]:
        return (*self.queue.task_ids(), *(group.task_id for batch in self.recorded.values() for group in batch))

    def put(self, group: FinishedGroup) -> None:
        self.queue.put(group)
        self.deadlines.add(self._deadline(group))

    def next(self, version: int) -> tuple[QueuedGroup, ...]:
        """The groups to train at `version`, in task order; none while there are too few, or one must be waited for."""
        if version in self.recorded:
            return self.recorded[version]
        if self.delivered:  # asked again, told again, whatever has arrived meanwhile
            return self.delivered
        if not self._is_enough or (self.settings.stale_action != "mask" and self.late_after(version) is not None):
            return ()
        return tuple(sorted(self.queue.oldest(self.settings.groups_per_step), key=lambda group: group.task_id))

    def deliver(self, version: int, batch: tuple[QueuedGroup, ...]) -> None:
        """The learner gets what next() chose: only it has the bytes from now on, and the journal."""
        if version not in self.recorded:
            self.delivered = self.queue.hand_out(group.lease_id for group in batch)

    def late_after(self, version: int) -> int | None:
        """The first step that would have too much to train in time, were the next batch trained at `version`.

        None when everything would be in time, and while no batch is complete.
        """
        if version in self.recorded or not self._is_enough:
            return None
        max_staleness = self.settings.max_staleness
        batch = self.queue.oldest_versions(self.settings.groups_per_step)
        trained = {oldest + max_staleness: num_groups for oldest, num_groups in batch.items()}
        return self.deadlines.first_overfull(version + 1, trained=trained)

    def would_fit(self, deadline: int, *, version: int) -> bool:
        """Whether one more open lease with this deadline can be trained in time, with all that is open.

        It can not be in the batch any more that the learner has now.
        """
        next_version = version + 1 if self.delivered else version
        self.deadlines.add(deadline)
        trained = Counter(map(self._deadline, self.delivered))
        fits = self.deadlines.first_overfull(next_version, trained=trained) is None
        self.deadlines.remove(deadline)
        return fits

    def consume(self, version: int, lease_ids: tuple[int, ...]) -> tuple[QueuedGroup, ...]:
        """The batch that was trained at `version`; it is not kept any longer."""
        self.delivered = ()
        recorded = self.recorded.pop(version, None)
        trained = recorded or self.queue.consume(lease_ids)
        for group in trained:
            self.deadlines.remove(version if recorded else self._deadline(group))
        return trained

    @property
    def _is_enough(self) -> bool:
        return len(self.queue) >= self.settings.groups_per_step

    def _deadline(self, group: QueuedGroup) -> int:
        return group.oldest_version + self.settings.max_staleness
