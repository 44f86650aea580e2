"""Delivery: the batch the learner wants, the one it has, and how long it waited."""

from learner.coordinator.replay_queue import QueuedGroup


class LearnerError(ValueError):
    """The learner said something that does not fit the state of the run: a bug of ours, or a wrong resume."""


class Delivery:
    """One batch at a time: wanted, delivered, completed. All times are seconds of the caller's clock."""

    def __init__(self, recorded: tuple[QueuedGroup, ...]) -> None:
        """recorded: the learner may have got this batch before the coordinator was started."""
        self.wanted_version: int | None = None  # the learner waits for the batch of this version
        self.lease_ids = _lease_ids(recorded)  # of the batch it has now
        self._wanted_at = 0.0
        self._delivered_at: float | None = None

    def want(self, version: int, now: float) -> None:
        if self.wanted_version is None:
            self._wanted_at = now
        self.wanted_version = version

    def deliver(self, batch: tuple[QueuedGroup, ...], now: float) -> float | None:
        """Returns the share of the cycle that the learner waited; None where that says nothing."""
        is_repeated, before = bool(self.lease_ids), self._delivered_at
        self.wanted_version, self.lease_ids, self._delivered_at = None, _lease_ids(batch), now
        if is_repeated or before is None or now <= before:
            return None
        return (now - self._wanted_at) / (now - before)

    def complete(self) -> None:
        self.lease_ids = ()


def _lease_ids(batch: tuple[QueuedGroup, ...]) -> tuple[int, ...]:
    return tuple(group.lease_id for group in batch)
