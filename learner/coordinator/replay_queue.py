"""ReplayQueue: finished groups in lease order, bounded in groups and in bytes, each consumed once."""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from common.messages import GroupHeader

# What a decoded header costs in memory, rounded up, beside the payload: so that a header of many short version
# runs cannot hide megabytes from the bound.
TRAJECTORY_OVERHEAD_BYTES = 512
VERSION_RUN_OVERHEAD_BYTES = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedGroup:
    """One validated group as it arrived: header and raw payload, so that it is handed on without being packed again."""

    header: GroupHeader
    payload: bytes
    oldest_version: int  # of all its sampled tokens
    newest_version: int

    @property
    def lease_id(self) -> int:
        return self.header.lease_id

    @property
    def task_id(self) -> int:
        return self.header.task_id

    @cached_property
    def num_bytes(self) -> int:
        """Memory the group takes in the queue, the decoded header included."""
        return len(self.payload) + header_bytes(
            len(self.header.trajectories), sum(len(t.version_runs) for t in self.header.trajectories)
        )

    def __repr__(self) -> str:
        versions = f"{self.oldest_version}..{self.newest_version}"
        return (
            f"<FinishedGroup lease {self.lease_id}, task {self.task_id}, {self.num_bytes} bytes, versions {versions}>"
        )


def header_bytes(num_trajectories: int, num_version_runs: int) -> int:
    """What the queue charges for a group's decoded header."""
    return num_trajectories * TRAJECTORY_OVERHEAD_BYTES + num_version_runs * VERSION_RUN_OVERHEAD_BYTES


class ReplayQueue:
    """Bounded, consume-once queue of groups in lease order. The producers' credits keep it within its bounds."""

    def __init__(self, *, max_groups: int, max_bytes: int) -> None:
        self.max_groups = max_groups
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lease_ids: list[int] = []  # ascending
        self._groups: dict[int, FinishedGroup] = {}
        self._consumed_up_to = -1  # groups are consumed in lease order: no lease id up to this one may come again

    def __len__(self) -> int:
        return len(self._lease_ids)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._groups

    def put(self, group: FinishedGroup) -> None:
        """Raises ValueError for a group that is or was in the queue, OverflowError when a bound would be exceeded."""
        if group.lease_id in self._groups or group.lease_id <= self._consumed_up_to:
            raise ValueError(f"lease {group.lease_id} was queued before; a group is consumed once")
        if len(self) >= self.max_groups or self.num_bytes + group.num_bytes > self.max_bytes:
            raise OverflowError(f"{self!r} has no room for {group!r}; it was not covered by a credit")
        insort(self._lease_ids, group.lease_id)
        self._groups[group.lease_id] = group
        self.num_bytes += group.num_bytes

    def oldest(self, num_groups: int) -> tuple[FinishedGroup, ...]:
        """The first `num_groups` groups in lease order, or fewer if there are fewer. They stay in the queue."""
        return tuple(self._groups[lease_id] for lease_id in self._lease_ids[:num_groups])

    def consume(self, lease_ids: Iterable[int]) -> None:
        """Forget the oldest groups for good; raises ValueError when these are not the oldest ones, in order."""
        consumed = list(lease_ids)
        if consumed != self._lease_ids[: len(consumed)]:
            raise ValueError(f"leases {consumed} are not the oldest of {self!r}; groups are consumed in lease order")
        for lease_id in consumed:
            self.num_bytes -= self._groups.pop(lease_id).num_bytes
            self._consumed_up_to = lease_id
        del self._lease_ids[: len(consumed)]

    def lease_ids(self) -> tuple[int, ...]:
        return tuple(self._lease_ids)

    def task_ids(self) -> tuple[int, ...]:
        """Tasks of the queued groups, in lease order."""
        return tuple(self._groups[lease_id].task_id for lease_id in self._lease_ids)

    def __repr__(self) -> str:
        span = f", leases {self._lease_ids[0]}..{self._lease_ids[-1]}" if self._lease_ids else ""
        return f"<ReplayQueue {len(self)}/{self.max_groups} groups, {self.num_bytes}/{self.max_bytes} bytes{span}>"
