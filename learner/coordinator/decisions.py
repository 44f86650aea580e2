"""What the coordinator's rules decide. The service turns each decision into messages; it decides nothing itself."""

from dataclasses import dataclass

from common.messages import EvaluatedEpisode
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
class FilterGroup:
    """The group teaches nothing and is not kept, see dynamic_sampling.py; once the journal says that, the server may
    forget it. version: for whose step."""

    server_id: str
    lease_id: int
    task_id: int
    version: int


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


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldFor:
    """Servers shall stay at the first version from `first` to `last` that they load, for a bounded time; see
    evaluations.py. server_id: whom to tell; empty for all."""

    first: int
    last: int
    server_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrantEvaluation:
    """Server `server_id` shall sample the evaluation task `task_id` with `version`, and no other."""

    server_id: str
    evaluation_id: int
    task_id: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportEvaluation:
    """The evaluation that the learner asked for is over."""

    asked_version: int
    version: int  # whose tokens these are; NO_VERSION when none was ever begun
    results: dict[int, tuple[EvaluatedEpisode, ...]]  # by task
    failed: dict[str, int]  # tasks that were given up, by kind of their last failure
    unfinished: int  # tasks
    reason: str  # why any are unfinished; empty when none is


Decision = (
    GrantLease
    | AcceptGroup
    | FilterGroup
    | RefuseGroup
    | CancelLease
    | DropServer
    | Quarantine
    | ParkTask
    | DeliverBatch
    | ForgetTrained
    | HoldFor
    | GrantEvaluation
    | ReportEvaluation
)
