"""LeaseBook: the open leases of a run, in order; who holds them, what bounds them, and how they end."""

from common.snapshot import NO_VERSION
from learner.coordinator.decisions import CancelLease, Decision, GrantLease, ParkTask
from learner.coordinator.ledger import FrontierState, PastLeases, TaskLedger, decode_frontier, encode_frontier
from learner.coordinator.members import Member
from learner.coordinator.records import Counts, Endings, OpenLease, grant_of
from learner.coordinator.replay_queue import FinishedGroup, ReplayQueue
from learner.coordinator.settings import CoordinatorSettings


class LeaseBook:
    """Running leases, finished groups and free tasks: what is in one place leaves it only for another one."""

    def __init__(self, settings: CoordinatorSettings, *, version: int, frontier: bytes) -> None:
        self.settings = settings
        self.version = version
        self.published_version = NO_VERSION
        self.queue = ReplayQueue(max_groups=settings.queue_groups, max_bytes=settings.queue_bytes)
        self.tasks = TaskLedger(max_failures=settings.max_task_failures, max_losses=settings.max_task_losses)
        self.members: dict[str, Member] = {}
        self.running: dict[int, OpenLease] = {}  # in lease order, because ids are given in order
        self.next_lease_id = 0
        self.endings = Endings(PastLeases())
        if frontier:
            state = decode_frontier(frontier, version=version, source=settings.source)
            self.tasks.restore(state)
            self.endings = Endings(state.past)
        self._leased_before = self.endings.total

    @property
    def num_open(self) -> int:
        return len(self.running) + len(self.queue)

    def hold(self) -> str:
        """Which bound keeps leases from being granted to anybody, for people; empty when none does."""
        settings = self.settings
        if self.num_open >= (settings.max_staleness + 1) * settings.groups_per_step:
            return f"the learner to complete step {self.version + 1}: more data would be older than max_staleness"
        if self.num_open >= settings.queue_groups:
            return f"the learner to empty the queue: {self.num_open} of {settings.queue_groups} groups are open"
        reserved_bytes = self.queue.num_bytes + (len(self.running) + 1) * settings.max_group_bytes
        if reserved_bytes > settings.queue_bytes:
            return f"the learner to empty the queue: {reserved_bytes} of {settings.queue_bytes} bytes would be needed"
        return ""

    def freest_member(self, now: float) -> Member | None:
        """The server to grant to: with no recent failure if possible, then the one with most free capacity."""
        best, best_key = None, (0, 0, 0)
        for member in self.members.values():
            free = member.free_groups(
                self.settings.max_group_bytes, failures_before_pause=self.settings.failures_before_pause, now=now
            )
            key = (-member.failures_in_a_row, free, -member.joined)
            if free > 0 and (best is None or key > best_key):
                best, best_key = member, key
        return best

    def grant(self, member: Member, now: float) -> GrantLease:
        """The next task to `member`. See core.py for why min_version bounds the staleness."""
        place = self.version * self.settings.groups_per_step + self.num_open
        lease = OpenLease(
            lease_id=self.next_lease_id,
            task_id=self.tasks.next(),
            server_id=member.server_id,
            min_version=max(0, place // self.settings.groups_per_step - self.settings.max_staleness),
            granted_at=now,
        )
        self.next_lease_id += 1
        if not member.has_work(self.published_version):
            member.progressed_at = now
        self.running[lease.lease_id] = lease
        member.leases[lease.lease_id] = lease.min_version
        return grant_of(lease)

    def batch(self) -> tuple[FinishedGroup, ...]:
        """The oldest groups_per_step open leases, if all of them are finished; else nothing."""
        batch = self.queue.oldest(self.settings.groups_per_step)
        oldest_running = next(iter(self.running), self.next_lease_id)
        complete = len(batch) == self.settings.groups_per_step and batch[-1].lease_id < oldest_running
        return batch if complete else ()

    def lease_of(self, server_id: str, lease_id: int) -> OpenLease | None:
        """The lease, if it is running at this server."""
        lease = self.running.get(lease_id)
        return lease if lease is not None and lease.server_id == server_id else None

    def fault(self, lease: OpenLease, group: FinishedGroup) -> tuple[str, str] | None:
        """(kind, reason) why the group does not fulfil the lease; None when it does."""
        if group.task_id != lease.task_id:
            return "wrong_task", f"lease {lease.lease_id} is for task {lease.task_id}, the group is of {group.task_id}"
        if group.num_bytes > self.settings.max_group_bytes:
            return "too_large", f"{group.num_bytes} bytes; a group may have {self.settings.max_group_bytes}"
        if group.newest_version > self.version:
            return "future_version", f"a token claims version {group.newest_version}, the run is at {self.version}"
        if group.oldest_version < lease.min_version:
            return "too_stale", f"a token is of version {group.oldest_version}, the lease demands {lease.min_version}"
        return None

    def accept(self, lease: OpenLease, group: FinishedGroup) -> None:
        self._close(lease)
        self.endings.note_accepted(lease.lease_id)
        self.queue.put(group)

    def fail(self, lease: OpenLease, kind: str, reason: str, *, blame_task: bool) -> list[Decision]:
        """The lease failed; its task is leased again, unless it is to blame and has failed too often."""
        self._close(lease)
        self.endings.note_failed(lease, kind)
        if not blame_task:
            self.tasks.postpone(lease.task_id)
            return []
        parked = self.tasks.failed(lease.task_id, f"{kind}: {reason}")
        return [self._parked(lease.task_id)] if parked else []

    def expire_all(self, member: Member, reason: str) -> list[Decision]:
        """The server is lost with all its leases."""
        decisions: list[Decision] = []
        for lease in [self.running[lease_id] for lease_id in member.leases]:
            self._close(lease)
            self.endings.note_expired(lease)
            decisions.append(CancelLease(server_id=member.server_id, lease_id=lease.lease_id, reason=reason))
            if self.tasks.lost(lease.task_id, f"server {member.server_id} was lost: {reason}"):
                decisions.append(self._parked(lease.task_id))
        return decisions

    def cancel_all(self, member: Member, kind: str, reason: str) -> list[Decision]:
        """Take the server's leases away; nothing is held against their tasks."""
        decisions: list[Decision] = []
        for lease in [self.running[lease_id] for lease_id in member.leases]:
            self._close(lease)
            self.endings.note_cancelled(lease, kind)
            self.tasks.give_back(lease.task_id)
            decisions.append(CancelLease(server_id=member.server_id, lease_id=lease.lease_id, reason=reason))
        return decisions

    def consume(self, lease_ids: tuple[int, ...]) -> None:
        """These groups, the oldest ones, were trained: their credits come back and the version grows by one."""
        for group in self.queue.oldest(len(lease_ids)):
            self.tasks.trained(group.task_id)
        self.queue.consume(lease_ids)
        self.endings.trained += len(lease_ids)
        self.version += 1

    def frontier(self) -> bytes:
        leased = (*self.queue.task_ids(), *(lease.task_id for lease in self.running.values()))
        return encode_frontier(
            FrontierState(
                version=self.version,
                source=self.settings.source,
                next_task_id=self.tasks.next_task_id,
                open_tasks=self.tasks.open_tasks(leased),
                parked=self.tasks.parked,
                past=self.endings.as_past(still_open=len(leased)),
            )
        )

    def counts(self) -> Counts:
        return Counts(
            leased=self._leased_before + self.next_lease_id,
            running=len(self.running),
            queued=len(self.queue),
            trained=self.endings.trained,
            failed=dict(self.endings.failed),
            cancelled=dict(self.endings.cancelled),
            expired=self.endings.expired,
            refused=dict(self.endings.refused),
        )

    def _close(self, lease: OpenLease) -> None:
        del self.running[lease.lease_id]
        del self.members[lease.server_id].leases[lease.lease_id]

    def _parked(self, task_id: int) -> ParkTask:
        return ParkTask(task_id=task_id, reason=self.tasks.parked[task_id])
