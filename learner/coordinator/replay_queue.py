"""ReplayQueue: finished groups, the earliest deadline first, bounded in groups and in bytes, each consumed once."""

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from common.codec import Frame
from common.messages import GroupHeader

# What a decoded header costs in memory, rounded up, beside the payload: so that a header of many short version
# runs cannot hide megabytes from the bound.
TRAJECTORY_OVERHEAD_BYTES = 512
VERSION_RUN_OVERHEAD_BYTES = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class FinishedGroup:
    """One validated group as it arrived: header and raw payload, so that it is handed on without being packed again."""

    header: GroupHeader
    payload: Frame
    oldest_version: int  # of all its sampled tokens
    newest_version: int
    accepted_version: int  # where the run was when it arrived

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

    def without_bytes(self) -> "JournaledGroup":
        """For when they are elsewhere."""
        return JournaledGroup(
            lease_id=self.lease_id,
            task_id=self.task_id,
            oldest_version=self.oldest_version,
            newest_version=self.newest_version,
            accepted_version=self.accepted_version,
            num_bytes=self.num_bytes,
        )

    def __repr__(self) -> str:
        versions = f"{self.oldest_version}..{self.newest_version}"
        return (
            f"<FinishedGroup lease {self.lease_id}, task {self.task_id}, {self.num_bytes} bytes, versions {versions}>"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JournaledGroup:
    """A group whose bytes are in the journal alone: it was accepted before a restart, or delivered to the learner."""

    lease_id: int
    task_id: int
    oldest_version: int
    newest_version: int
    accepted_version: int
    num_bytes: int = 0  # charged like those of any other group: they are read when it is delivered
    batch_version: int | None = None  # of the batch it was delivered in


QueuedGroup = FinishedGroup | JournaledGroup


def header_bytes(num_trajectories: int, num_version_runs: int) -> int:
    """What the queue charges for a group's decoded header."""
    return num_trajectories * TRAJECTORY_OVERHEAD_BYTES + num_version_runs * VERSION_RUN_OVERHEAD_BYTES


class ReplayQueue:
    """Bounded, consume-once queue: the group with the oldest token first. The producers' credits keep its bounds."""

    def __init__(self, *, max_groups: int, max_bytes: int) -> None:
        self.max_groups = max_groups
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._order: list[tuple[int, int]] = []  # (oldest version, lease), ascending
        self._groups: dict[int, QueuedGroup] = {}
        self._num_of_version: Counter[int] = Counter()  # groups by oldest version: few keys for many groups

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._groups

    def put(self, group: QueuedGroup) -> None:
        """Raises ValueError for a group that is in the queue, OverflowError when a bound would be exceeded."""
        if len(self) >= self.max_groups or self.num_bytes + group.num_bytes > self.max_bytes:
            raise OverflowError(f"{self!r} has no room for {group!r}; it was not covered by a credit")
        self.put_back(group)

    def put_back(self, group: QueuedGroup) -> None:
        """A group that had its place before a restart keeps it, whatever the bounds are now."""
        if group.lease_id in self._groups:
            raise ValueError(f"lease {group.lease_id} is queued already; a group is consumed once")
        insort(self._order, (group.oldest_version, group.lease_id))
        self._groups[group.lease_id] = group
        self._num_of_version[group.oldest_version] += 1
        self.num_bytes += group.num_bytes

    def oldest(self, num_groups: int) -> tuple[QueuedGroup, ...]:
        """The first `num_groups` groups, or fewer if there are fewer. They stay in the queue."""
        return tuple(self._groups[lease_id] for _, lease_id in self._order[:num_groups])

    def oldest_versions(self, num_groups: int) -> dict[int, int]:
        """How many of oldest(num_groups) have which version as their oldest, without looking at each of them."""
        versions: dict[int, int] = {}
        left = num_groups
        for version in sorted(self._num_of_version):
            versions[version] = min(left, self._num_of_version[version])
            left -= versions[version]
            if not left:
                break
        return versions

    def hand_out(self, lease_ids: Iterable[int]) -> tuple[QueuedGroup, ...]:
        """The bytes of these groups go to the learner: what stays are their places, charged as before, and returned."""
        handed_out = []
        for lease_id in lease_ids:
            group = self._groups[lease_id]
            if isinstance(group, FinishedGroup):
                group = self._groups[lease_id] = group.without_bytes()
            handed_out.append(group)
        return tuple(handed_out)

    def consume(self, lease_ids: Iterable[int]) -> tuple[QueuedGroup, ...]:
        """Forget these groups for good, and return them; raises KeyError for one that is not there."""
        consumed = tuple(self._groups.pop(lease_id) for lease_id in lease_ids)
        self.num_bytes -= sum(group.num_bytes for group in consumed)
        self._num_of_version -= Counter(group.oldest_version for group in consumed)
        self._order = [place for place in self._order if place[1] in self._groups]
        return consumed

    def lease_ids(self) -> tuple[int, ...]:
        return tuple(lease_id for _, lease_id in self._order)

    def task_ids(self) -> tuple[int, ...]:
        """Tasks of the queued groups."""
        return tuple(group.task_id for group in self._groups.values())

    def __repr__(self) -> str:
        span = f", oldest token version {self._order[0][0]}" if self._order else ""
        return f"<ReplayQueue {len(self)}/{self.max_groups} groups, {self.num_bytes}/{self.max_bytes} bytes{span}>"
