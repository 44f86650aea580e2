"""LeaseBook: the open leases of a run; who holds them, when they are due, and how they end."""

from collections.abc import Sequence

from common.snapshot import NO_VERSION
from learner.coordinator.batches import Batches
from learner.coordinator.bounds import Bounds
from learner.coordinator.decisions import CancelLease, Decision, GrantLease, ParkTask
from learner.coordinator.dynamic_sampling import EQUAL_REWARDS, DynamicSampling
from learner.coordinator.ledger import FrontierState, PastLeases, TaskLedger, encode_frontier
from learner.coordinator.members import Member, Members
from learner.coordinator.mix import Mix
from learner.coordinator.records import ACCEPTED, Claim, Counts, Endings, OpenLease, grant_of
from learner.coordinator.recovery import Recovered
from learner.coordinator.replay_queue import FinishedGroup, QueuedGroup, ReplayQueue
from learner.coordinator.settings import CoordinatorSettings

# Leases granted after the last word in the journal may be held by servers: their ids are not given to others.
LEASE_ID_LEAP = 1 << 16


class LeaseBook:
    """Running leases, finished groups and free tasks: what is in one place leaves it only for another one."""

    def __init__(self, settings: CoordinatorSettings, recovered: Recovered) -> None:
        self.settings = settings
        self.version = recovered.version
        self.published_version = NO_VERSION
        self.batches = Batches(settings, recovered)
        self.mix = Mix(settings.environment_weights)
        self.tasks = TaskLedger(
            max_failures=settings.max_task_failures, max_losses=settings.max_task_losses, mix=self.mix
        )
        self.members = Members(settings)
        self.running: dict[int, OpenLease] = {}  # in the order of granting
        self.next_lease_id = recovered.next_lease_id
        self.leased = recovered.past.leased
        self.endings = Endings(recovered.past)
        self.sampling = DynamicSampling(settings.max_filtered, recovered.filtered, version=self.version)
        self.bounds = Bounds(settings, self.running, self.batches)
        self.tasks.restore(recovered.tasks)

    @property
    def queue(self) -> ReplayQueue:
        return self.batches.queue

    def grant(self, member: Member, now: float) -> GrantLease | None:
        """The next task to `member`. See deadlines.py for why min_version bounds the staleness.

        None when there is none for it now: the environments that it could run are down.
        """
        task_id = self.tasks.next(lambda environment: self.may_run(member, environment, now))
        if task_id is None:
            return None
        place = self.version * self.settings.groups_per_step + self.bounds.num_open
        must_be = place // self.settings.groups_per_step - self.settings.max_staleness
        # What the server has loaded is all that it will sample with, so the group is due later than it might be.
        will_be = min(member.loaded_version, self.published_version)
        min_version = max(0, must_be, will_be)
        lease = OpenLease(
            lease_id=self.next_lease_id,
            task_id=task_id,
            server_id=member.server_id,
            min_version=min_version,
            deadline=min_version + self.settings.max_staleness,
            granted_at=now,
        )
        self.next_lease_id += 1
        self._open(lease, member, now)
        return grant_of(lease)

    def adopt(self, member: Member, claims: Sequence[Claim], now: float) -> list[Decision]:
        """The server goes on with leases from before, as far as their tasks are free and still in time."""
        decisions: list[Decision] = []
        for claim in claims:
            if claim.lease_id in member.leases:
                continue  # claimed twice
            if self._may_adopt(claim):
                lease = OpenLease(
                    lease_id=claim.lease_id,
                    task_id=claim.task_id,
                    server_id=member.server_id,
                    min_version=claim.min_version,
                    deadline=claim.min_version + self.settings.max_staleness,
                    granted_at=now,
                )
                self._open(lease, member, now)
            else:
                reason = "it was given up meanwhile"
                decisions.append(CancelLease(server_id=member.server_id, lease_id=claim.lease_id, reason=reason))
        return decisions

    def batch(self) -> tuple[QueuedGroup, ...]:
        """The groups to train now, in task order; none while there are too few, or one must be waited for."""
        return self.batches.next(self.version)

    def awaited(self) -> OpenLease | None:
        """The running lease with the earliest deadline: what a batch waits for first."""
        return min(self.running.values(), key=lambda lease: (lease.deadline, lease.lease_id), default=None)

    def cancel_late(self) -> list[Decision]:
        """Give up running groups that keep a batch waiting, so that nothing is trained too late: the youngest first.

        A task that was given up too often is waited for, so that the slowest one is trained too.
        """
        decisions: list[Decision] = []
        while (lease := self._late_lease()) is not None:
            reason = f"its tokens would be older than {self.settings.max_staleness} versions after this step"
            self._close(lease)
            self.endings.note_cancelled(lease, "requeued")
            self.tasks.requeued(lease.task_id)
            decisions.append(CancelLease(server_id=lease.server_id, lease_id=lease.lease_id, reason=reason))
        return decisions

    def lease_of(self, server_id: str, lease_id: int) -> OpenLease | None:
        """The lease, if it is running at this server."""
        lease = self.running.get(lease_id)
        return lease if lease is not None and lease.server_id == server_id else None

    def why_not_running(self, lease_id: int) -> tuple[str, str]:
        """(kind, reason) for a server that sends a group for a lease that is not running there."""
        ending = self.endings.of(lease_id)
        if lease_id in self.running or lease_id >= self.next_lease_id:
            return "not_yours", "it was never granted to this server"
        if ending == ACCEPTED:
            return "duplicate", "a group of it was accepted before"
        return "ended", f"it {ending or 'ended long ago'}"

    def fault(self, lease: OpenLease, group: FinishedGroup) -> tuple[str, str] | None:
        """(kind, reason) why the group does not fulfil the lease; None when it does."""
        loaded = self.members[lease.server_id].loaded_version
        if group.task_id != lease.task_id:
            return "wrong_task", f"lease {lease.lease_id} is for task {lease.task_id}, the group is of {group.task_id}"
        if group.num_bytes > self.settings.max_group_bytes:
            return "too_large", f"{group.num_bytes} bytes; a group may have {self.settings.max_group_bytes}"
        if group.newest_version > self.published_version:
            return (
                "future_version",
                f"a token claims version {group.newest_version}, {self.published_version} is published",
            )
        if group.newest_version > loaded:
            return "unconfirmed_version", f"a token claims version {group.newest_version}, the server said {loaded}"
        if group.oldest_version < lease.min_version:
            return "too_stale", f"a token is of version {group.oldest_version}, the lease demands {lease.min_version}"
        return None

    def accept(self, lease: OpenLease, group: FinishedGroup) -> bool:
        """The lease is fulfilled. False: the group is not queued, for dynamic sampling filters it."""
        self._close(lease)
        self.members[lease.server_id].down.pop(self.mix.environment_of(lease.task_id), None)
        self.endings.note_accepted(lease.lease_id)
        if not self.sampling.filters(group.header, version=self.version):
            self.batches.put(group)
            return True
        self.endings.count_cancelled(EQUAL_REWARDS)
        self.tasks.done(lease.task_id)
        self.sampling.note_filtered(lease.task_id, version=self.version)
        return False

    def fail(self, lease: OpenLease, kind: str, reason: str, *, blame_task: bool) -> list[Decision]:
        """The lease failed; its task is leased again, unless it is to blame and has failed too often."""
        self._close(lease)
        self.endings.note_failed(lease, kind)
        if not blame_task:
            self.tasks.postpone(lease.task_id)
            return []
        parked = self.tasks.failed(lease.task_id, f"{kind}: {reason}")
        return [self._parked(lease.task_id)] if parked else []

    def fail_unavailable(self, lease: OpenLease, kind: str, reason: str, now: float) -> None:
        """The lease failed because its environment is down, as seen from its server; the task waits for that."""
        self._close(lease)
        self.endings.note_failed(lease, kind)
        self.tasks.keep_waiting(lease.task_id)
        self.members[lease.server_id].note_down(self.mix.environment_of(lease.task_id), reason, now)

    def may_run(self, member: Member, environment: int, now: float) -> bool:
        """Whether the server may have a lease of the environment. One that was down gets one at a time, after a pause,
        until a group is finished."""
        down = member.down.get(environment)
        if down is None:
            return True
        task_ids = (self.running[lease_id].task_id for lease_id in member.leases)
        return now >= down.paused_until and environment not in map(self.mix.environment_of, task_ids)

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
        """These groups were trained: their credits come back and the version grows by one."""
        trained = self.batches.consume(self.version, lease_ids)
        for group in trained:
            self.tasks.done(group.task_id)
        self.endings.trained += len(trained)
        self.version += 1
        self.sampling.reached(self.version)

    def frontier(self) -> bytes:
        running = (lease.task_id for lease in self.running.values())
        leased = (*self.batches.task_ids(), *running, *self.sampling.task_ids())
        return encode_frontier(
            FrontierState(
                version=self.version,
                source=self.settings.source,
                next_task_id=self.tasks.next_task_id,
                open_tasks=self.tasks.open_tasks(leased),
                parked=self.tasks.parked,
                past=self.past(),
            )
        )

    def past(self) -> PastLeases:
        """How many leases there were, and how they ended: what a restart goes on counting from."""
        return self.endings.past(leased=self.leased, next_lease_id=self.next_lease_id)

    def counts(self) -> Counts:
        return Counts(
            leased=self.leased,
            running=len(self.running),
            queued=len(self.batches),
            trained=self.endings.trained,
            failed=dict(self.endings.failed),
            cancelled=dict(self.endings.cancelled),
            expired=self.endings.expired,
            refused=dict(self.endings.refused),
        )

    def _late_lease(self) -> OpenLease | None:
        """The lease to give up, of those that must be trained with this batch or could not be trained in time."""
        late = self.batches.late_after(self.version)
        if late is None:
            return None
        for lease in reversed(self.running.values()):
            if lease.deadline <= late and self.tasks.requeues(lease.task_id) < self.settings.max_requeues:
                return lease
        return None

    def _may_adopt(self, claim: Claim) -> bool:
        """Takes the task, if so. Adopting must keep every bound that granting keeps."""
        is_open = claim.lease_id in self.running or claim.lease_id in self.queue
        if is_open or not self.endings.may_go_on(claim.lease_id):
            return False
        if self.bounds.num_open >= min(self.bounds.pacing, self.settings.queue_groups):
            return False
        if self.bounds.bytes_with_one_more > self.settings.queue_bytes or claim.min_version > self.version:
            return False
        in_time = self.batches.would_fit(claim.min_version + self.settings.max_staleness, version=self.version)
        return in_time and self.tasks.claim(claim.task_id, at_most_ahead=self.bounds.pacing)

    def _open(self, lease: OpenLease, member: Member, now: float) -> None:
        # Many are granted at one moment: all that the server has is looked through before the first of them only.
        if member.progressed_at < now and not member.has_work(self.published_version):
            member.progressed_at = now
        self.leased += 1
        self.running[lease.lease_id] = lease
        self.batches.deadlines.add(lease.deadline)
        member.leases[lease.lease_id] = lease.min_version

    def _close(self, lease: OpenLease) -> None:
        del self.running[lease.lease_id]
        self.batches.deadlines.remove(lease.deadline)
        self.members.end_lease(lease.server_id, lease.lease_id)

    def _parked(self, task_id: int) -> ParkTask:
        return ParkTask(task_id=task_id, reason=self.tasks.parked[task_id])
