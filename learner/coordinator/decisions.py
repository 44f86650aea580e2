"""What the coordinator's rules decide. The service turns each decision into messages; it decides nothing itself."""

from dataclasses import dataclass

from learner.coordinator.replay_queue import FinishedGroup, QueuedGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantLease:
    """Server `server_id` shall do task `task_id`, sampling with no policy older than `min_version`."""

    server_id: str
    lease_id: int
    task_id: int
    min_version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptGroup:
    """The group is in the queue; once the journal has it, the server may forget it."""

    server_id: str
    group: FinishedGroup

    @property
    def lease_id(self) -> int:
        return self.group.lease_id


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseGroup:
    """The group will never be taken. `kind` is one of a few fixed words, for metrics; `reason` is for people."""

    server_id: str
    lease_id: int
    kind: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelLease:
    """Nothing is expected for the lease any more."""

    server_id: str
    lease_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DropServer:
    """The server is no member any more: it must say Hello again before it gets leases. Its leases have ended."""

    server_id: str
    reason: str
    may_return: bool = True  # False: it would only be dropped again


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """The peer sent rubbish too often: nothing it sends is read any more."""

    server_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkTask:
    """The task failed too often and is not leased again."""

    task_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliverBatch:
    """The groups, in task order, of the optimizer step that updates `version`, once the journal has this batch."""

    version: int
    groups: tuple[QueuedGroup, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetTrained:
    """A checkpoint at `version` is safe: the journal need not keep what was trained before."""

    version: int


Decision = (
    GrantLease
    | AcceptGroup
    | RefuseGroup
    | CancelLease
    | DropServer
    | Quarantine
    | ParkTask
    | DeliverBatch
    | ForgetTrained
)
