"""Bounds: how many leases may be open at once, in groups and in bytes, and who must act before there can be more."""

from collections.abc import Sized
from typing import Literal

from learner.coordinator.batches import Batches
from learner.coordinator.depth import Depth
from learner.coordinator.settings import CoordinatorSettings

Bound = Literal["max_staleness", "queue_groups", "queue_bytes", "depth"]


class Bounds:
    """Of running leases and finished groups together; every running lease has a whole group's bytes set aside."""

    def __init__(self, settings: CoordinatorSettings, running: Sized, batches: Batches) -> None:
        self._settings = settings
        self._running = running
        self._batches = batches
        self.pacing = (settings.max_staleness + 1) * settings.groups_per_step
        """Groups that can be open at most, if each of them is to be trained in time."""
        self.depth = Depth(groups_per_step=settings.groups_per_step, ceiling=min(self.pacing, settings.queue_groups))

    @property
    def num_open(self) -> int:
        return len(self._running) + len(self._batches)

    @property
    def bytes_with_one_more(self) -> int:
        """Bytes that are queued, or would be set aside for running leases, were there one more."""
        return self._batches.queue.num_bytes + (len(self._running) + 1) * self._settings.max_group_bytes

    def held_by(self) -> Bound | None:
        """The bound that keeps leases from being granted to anybody, if one does."""
        num_open = self.num_open
        if num_open >= self.pacing:
            return "max_staleness"
        if num_open >= self._settings.queue_groups:
            return "queue_groups"
        if self.bytes_with_one_more > self._settings.queue_bytes:
            return "queue_bytes"
        return "depth" if num_open >= self.depth.leases else None

    @property
    def room(self) -> int:
        """How many leases can be granted before held_by() names a bound: each takes one place, and a group's bytes."""
        settings = self._settings
        places = min(self.pacing, settings.queue_groups, self.depth.leases)
        bytes_left = settings.queue_bytes - self._batches.queue.num_bytes
        return max(0, min(places - self.num_open, bytes_left // settings.max_group_bytes - len(self._running)))

    def hold(self, version: int) -> str:
        """Who must do what before leases can be granted to anybody, for people; empty when they can be.

        version: the one that the run is at.
        """
        settings, num_open = self._settings, self.num_open
        match self.held_by():
            case "max_staleness":
                return f"the learner to complete step {version + 1}: more data would be older than max_staleness"
            case "queue_groups":
                return f"the learner to empty the queue: {num_open} of {settings.queue_groups} groups are open"
            case "queue_bytes":
                needed, bound = self.bytes_with_one_more, settings.queue_bytes
                return f"the learner to empty the queue: {needed} of {bound} bytes would be needed"
            case "depth":
                return f"the learner to complete step {version + 1}: {num_open} open groups keep it busy"
            case None:
                return ""
