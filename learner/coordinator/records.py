"""What the coordinator keeps of leases: the open ones, how the others ended, and the sums that must always agree."""

from collections import Counter, OrderedDict
from dataclasses import dataclass

from learner.coordinator.decisions import GrantLease
from learner.coordinator.ledger import PastLeases

MAX_KINDS = 32  # words for failures come from servers: the counters must not grow with their imagination
MAX_ENDED_REMEMBERED = 1 << 14
ACCEPTED = "was accepted"
EXPIRED = "expired"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLease:
    """A lease that is running at a server."""

    lease_id: int
    task_id: int
    server_id: str
    min_version: int
    deadline: int  # the last version that may be updated with the group
    granted_at: float  # seconds of the caller's clock


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A lease that a server proved to have been granted before this coordinator, or before the server was given up."""

    lease_id: int
    task_id: int
    min_version: int


def grant_of(lease: OpenLease) -> GrantLease:
    """The decision that tells the lease to its server."""
    return GrantLease(
        server_id=lease.server_id, lease_id=lease.lease_id, task_id=lease.task_id, min_version=lease.min_version
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Every lease ever granted is in exactly one place. Counts are since the run began, resumes included."""

    leased: int
    running: int
    queued: int  # groups handed to the learner count as queued until their step is completed
    trained: int
    failed: dict[str, int]
    cancelled: dict[str, int]
    expired: int
    refused: dict[str, int]  # groups, not leases: a duplicate is refused while its lease is queued

    @property
    def balanced(self) -> bool:
        """leased = running + queued + trained + failed + cancelled + expired"""
        ended = self.trained + sum(self.failed.values()) + sum(self.cancelled.values()) + self.expired
        return self.leased == self.running + self.queued + ended


def count(counter: Counter[str], kind: str) -> None:
    """Count `kind`, or "other" when there are too many kinds already."""
    counter[kind if kind in counter or len(counter) < MAX_KINDS else "other"] += 1


class Endings:
    """How leases ended: counted for ever, remembered by lease for a while, so that late groups get a true answer."""

    def __init__(self, past: PastLeases) -> None:
        self.trained = past.trained
        self.expired = past.expired
        self.failed = Counter(past.failed)
        self.cancelled = Counter(past.cancelled)
        self.refused = Counter(past.refused)
        self._recent: OrderedDict[int, str] = OrderedDict()

    def note_failed(self, lease: OpenLease, kind: str) -> None:
        count(self.failed, kind)
        self._remember(lease.lease_id, f"failed ({kind})")

    def note_cancelled(self, lease: OpenLease, kind: str) -> None:
        count(self.cancelled, kind)
        self._remember(lease.lease_id, f"was cancelled ({kind})")

    def count_cancelled(self, kind: str) -> None:
        """Of a lease whose ending is noted otherwise."""
        count(self.cancelled, kind)

    def note_expired(self, lease: OpenLease) -> None:
        self.expired += 1
        self._remember(lease.lease_id, f"{EXPIRED}: server {lease.server_id} was lost")

    def note_accepted(self, lease_id: int) -> None:
        """Not an ending yet, but the last that its server can do about the lease."""
        self._remember(lease_id, ACCEPTED)

    def note_refused(self, lease_id: int) -> None:
        """Its server is told to forget the group: it must not be taken to go on with the lease."""
        self._remember(lease_id, "ended, and its group was refused")

    def of(self, lease_id: int) -> str:
        """What became of a lease that is not running; empty when it is forgotten or was never granted."""
        return self._recent.get(lease_id, "")

    def may_go_on(self, lease_id: int) -> bool:
        """Whether the server that had the lease may have it again: it was never heard of, or only given up."""
        ending = self.of(lease_id)
        return not ending or ending.startswith(EXPIRED)

    @property
    def total(self) -> int:
        return self.trained + self.expired + self.failed.total() + self.cancelled.total()

    def _remember(self, lease_id: int, ending: str) -> None:
        self._recent[lease_id] = ending
        if len(self._recent) > MAX_ENDED_REMEMBERED:
            self._recent.popitem(last=False)

    def past(self, *, leased: int, next_lease_id: int) -> PastLeases:
        """For a checkpoint and the journal."""
        return PastLeases(
            leased=leased,
            next_lease_id=next_lease_id,
            trained=self.trained,
            failed=dict(self.failed),
            cancelled=dict(self.cancelled),
            expired=self.expired,
            refused=dict(self.refused),
        )
