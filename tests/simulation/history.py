"""History: what was seen of a simulated run from outside, in order. The checker reads nothing else."""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple, get_args

from tests.simulation.plan import Plan

# `life` counts the coordinator processes of a history, `lineage` the learner's starts. A `nonce` names one group as it
# was sampled: the same lease sampled twice has two. Times are virtual seconds, versions are policy versions.


class Planned(NamedTuple):
    now: float
    plan: Plan


class LearnerStarted(NamedTuple):
    """It goes on from its last checkpoint, or begins, when there is none."""

    now: float
    lineage: int
    version: int
    is_new_run: bool


class LearnerCrashed(NamedTuple):
    now: float
    lineage: int


class CoordinatorOpened(NamedTuple):
    now: float
    life: int
    version: int


class CoordinatorPaused(NamedTuple):
    now: float
    life: int
    pause_s: float


class CoordinatorCrashed(NamedTuple):
    now: float
    life: int


class WentWrong(NamedTuple):
    """A fault was injected; `who` is a server, where it is one's."""

    now: float
    kind: str
    who: str


class ServerStarted(NamedTuple):
    now: float
    epoch: str
    key: str
    is_honest: bool


class ServerStopped(NamedTuple):
    now: float
    epoch: str
    how: str


class Joined(NamedTuple):
    """The server is a member, also when it was one before."""

    now: float
    life: int
    server: str
    key: str
    capacity_groups: int


class Confirmed(NamedTuple):
    """A server says which version it has loaded."""

    now: float
    life: int
    server: str
    version: int


class Granted(NamedTuple):
    now: float
    life: int
    server: str
    key: str
    lease: int
    task: int
    min_version: int
    at_version: int
    silent_s: float  # since the server was last heard, the coordinator's own pauses excepted


class Adopted(NamedTuple):
    """The server goes on with a lease of a coordinator before this one, or from before it was given up."""

    now: float
    life: int
    server: str
    lease: int
    task: int
    min_version: int


class Sampled(NamedTuple):
    """A server finished a group and sends it, again and again until it is answered."""

    now: float
    epoch: str
    lease: int
    task: int
    nonce: int
    oldest: int  # true versions of its tokens
    newest: int
    claimed_oldest: int
    claimed_newest: int
    lie: str  # empty for a true group
    is_equal: bool  # whether all its rewards are the same


class Failed(NamedTuple):
    """The coordinator heard that a lease could not be fulfilled."""

    now: float
    life: int
    server: str
    lease: int


class Accepted(NamedTuple):
    """Decided, but neither safe nor said yet."""

    now: float
    life: int
    server: str
    lease: int
    task: int
    nonce: int
    at_version: int


class Filtered(NamedTuple):
    """Likewise: the lease is fulfilled by a group that teaches nothing, and is not trained."""

    now: float
    life: int
    server: str
    lease: int
    task: int
    nonce: int
    at_version: int


class Committed(NamedTuple):
    """A transaction of the journal is safe."""

    now: float
    life: int
    nonces: tuple[int, ...]
    filtered: tuple[int, ...]  # tasks
    batches: tuple[int, ...]  # versions


class Answered(NamedTuple):
    """The server is told what became of its group, and forgets it."""

    now: float
    life: int
    server: str
    lease: int
    is_accepted: bool


class Refused(NamedTuple):
    """Decided: the group will never be taken."""

    now: float
    life: int
    server: str
    lease: int
    nonce: int
    kind: str


class Cancelled(NamedTuple):
    now: float
    life: int
    server: str
    lease: int
    reason: str


class Dropped(NamedTuple):
    now: float
    life: int
    server: str
    reason: str
    silent_s: float


class Quarantined(NamedTuple):
    now: float
    life: int
    server: str
    key: str


class Parked(NamedTuple):
    now: float
    life: int
    task: int


class Delivered(NamedTuple):
    """A batch leaves for the learner."""

    now: float
    life: int
    version: int
    leases: tuple[int, ...]
    tasks: tuple[int, ...]
    nonces: tuple[int, ...]


class Trained(NamedTuple):
    """The optimizer step that updates `version` is done."""

    now: float
    lineage: int
    version: int
    leases: tuple[int, ...]
    tasks: tuple[int, ...]
    nonces: tuple[int, ...]
    oldest: int  # claimed versions of the tokens that got a gradient
    newest: int


class Published(NamedTuple):
    now: float
    lineage: int
    version: int


class Checkpointed(NamedTuple):
    """A checkpoint is safe. The tasks are what its frontier says."""

    now: float
    lineage: int
    version: int
    next_task: int
    open_tasks: tuple[int, ...]
    parked: tuple[int, ...]


class EvaluationAsked(NamedTuple):
    """The learner wants an evaluation of this version, or of a later one."""

    now: float
    lineage: int
    version: int


class EvaluationGranted(NamedTuple):
    now: float
    life: int
    server: str
    evaluation: int  # unique within the life
    task: int
    version: int
    silent_s: float


class EvaluationSampled(NamedTuple):
    """A server did an evaluation task and says so once. Versions are the true ones of its tokens."""

    now: float
    epoch: str
    task: int
    nonce: int
    oldest: int
    newest: int


class EvaluationHeard(NamedTuple):
    """The coordinator hears that an evaluation task is done, or cannot be."""

    now: float
    life: int
    server: str
    evaluation: int


class EvaluationReported(NamedTuple):
    """To the learner, who asked for it."""

    now: float
    lineage: int
    asked_version: int
    version: int
    tasks: tuple[int, ...]
    nonces: tuple[int, ...]
    num_failed: int
    num_unfinished: int


class Observed(NamedTuple):
    """counts(), and how full the queue is."""

    now: float
    life: int
    version: int
    leased: int
    running: int
    queued: int
    trained: int
    ended: int  # failed, cancelled and expired
    is_balanced: bool
    queue_bytes: int


class Calmed(NamedTuple):
    """From now on nothing more goes wrong, except that liars lie; what is wrong ends by itself."""

    now: float
    version: int


class Ended(NamedTuple):
    """`next_task`, `open_tasks`, `parked`: the frontier now; `queued`: leases of the groups in the queue."""

    now: float
    version: int
    is_finished: bool
    next_task: int
    open_tasks: tuple[int, ...]
    parked: tuple[int, ...]
    queued: tuple[int, ...]


class Broke(NamedTuple):
    """The coordinator's own code raised."""

    now: float
    what: str


Event = (
    Planned | LearnerStarted | LearnerCrashed | CoordinatorOpened | CoordinatorPaused | CoordinatorCrashed
    | WentWrong | ServerStarted | ServerStopped | Joined | Confirmed | Granted | Adopted | Sampled | Failed
    | Accepted | Filtered | Committed | Answered | Refused | Cancelled | Dropped | Quarantined | Parked | Delivered
    | Trained | Published | Checkpointed | EvaluationAsked | EvaluationGranted | EvaluationSampled | EvaluationHeard
    | EvaluationReported | Observed | Calmed | Ended | Broke
)  # fmt: skip

EVENTS: tuple[type[Event], ...] = get_args(Event)


class History:
    """Append-only list of events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.note = self.events.append

    def __iter__(self) -> Iterator[Event]:
        return iter(self.events)

    def __len__(self) -> int:
        return len(self.events)

    def digest(self) -> str:
        """Equal for equal histories, and for no others."""
        digest = hashlib.blake2b(digest_size=16)
        for event in self.events:
            digest.update(repr(event).encode())
        return digest.hexdigest()

    def up_to(self, place: int, number: int) -> str:
        """The last `number` events up to the one at `place`, a line each."""
        return "\n".join(describe(event) for event in self.events[max(0, place + 1 - number) : place + 1])


def describe(event: Event) -> str:
    """One line."""
    fields = event._asdict()
    now = fields.pop("now")
    return f"{now:9.3f}  {type(event).__name__:17} " + " ".join(f"{name}={value}" for name, value in fields.items())
