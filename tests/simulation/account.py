"""Account: what somebody who only reads the history knows at each event. It shares no code with the coordinator."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.simulation import history as seen
from tests.simulation.plan import Plan

NO_FAULT = ("duplicate", "ended", "not_yours")  # refusals that end no lease
TOO_SLOW = "would be older than"  # in the reason of a lease that was taken away so that others can be trained


class Batch(NamedTuple):
    leases: tuple[int, ...]
    tasks: tuple[int, ...]
    nonces: tuple[int, ...]


@dataclass(slots=True)
class Running:
    """A lease that its server works on."""

    server: str
    task: int
    min_version: int


@dataclass(slots=True)
class Waiting:
    """A task that was given back."""

    ahead: int  # tasks that were waiting when it was given back
    overtaken: int = 0  # by tasks that were never handed out before


@dataclass
class Life:
    """What one coordinator process knows, and takes to its grave."""

    running: dict[int, Running] = field(default_factory=dict)  # by lease
    running_tasks: set[int] = field(default_factory=set)
    held: Counter[str] = field(default_factory=Counter)  # running leases by server
    capacity: dict[str, int] = field(default_factory=dict)
    accepted: dict[int, int] = field(default_factory=dict)  # lease -> nonce
    confirmed: dict[str, int] = field(default_factory=dict)  # server -> version
    quarantined: set[str] = field(default_factory=set)  # servers
    quarantined_keys: set[str] = field(default_factory=set)
    parked: set[int] = field(default_factory=set)
    given_up: Counter[int] = field(default_factory=Counter)  # how often a task was taken away because it took too long


class Account:
    """Methods on_... are named after the events that they book. A check looks at it before the event is booked."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.honest: dict[str, bool] = {}  # epoch
        self.honest_keys: set[str] = set()
        self.samples: dict[int, seen.Sampled] = {}  # by nonce
        self.has_failures = False
        self.is_calm = False
        self._begin()

    def _begin(self) -> None:
        """Nothing is continued of what was before."""
        self.life = Life()
        self.lineage: list[Batch] = []  # by version: what made the next one of it
        self.trained_tasks: set[int] = set()
        self.trained_nonces: set[int] = set()
        self.delivered: dict[int, Batch] = {}  # by version
        self.recorded: set[int] = set()  # versions
        self.checkpoint = 0
        self.published = -1
        self.alive: dict[int, int] = {}  # task -> nonce, of every accepted group that no crash has undone
        self.filtered: dict[int, seen.Filtered] = {}  # by task; likewise
        self.safe: set[int] = set()  # nonces
        self.promised: dict[int, int] = {}  # nonce -> lease
        self.promised_before_calm: set[int] = set()
        self.waiting: dict[int, Waiting] = {}  # by task
        self.newest_task = -1
        self.tries: Counter[int] = Counter()  # of each task
        self.parked: set[int] = set()  # ever

    # --- processes -------------------------------------------------------------------------------------------------

    def on_learner_started(self, event: seen.LearnerStarted) -> None:
        if event.is_new_run:
            self._begin()
        del self.lineage[event.version :]
        self.trained_tasks = {task for batch in self.lineage for task in batch.tasks}
        self.trained_nonces = {nonce for batch in self.lineage for nonce in batch.nonces}
        self.published = -1
        self.leases: dict[int, int] = {}  # lease -> task, granted since this start of the learner

    def on_coordinator_crashed(self, event: seen.CoordinatorCrashed) -> None:
        undone = {task for task, nonce in self.alive.items() if nonce not in self.safe}
        for task in undone:
            del self.alive[task]
        unfiltered = {task for task, event in self.filtered.items() if event.nonce not in self.safe}
        for task in unfiltered:
            del self.filtered[task]
        lost = sorted(undone | unfiltered | self.life.running_tasks)
        self.life = Life()
        for task in lost:
            self._give_back(task)

    def on_server_started(self, event: seen.ServerStarted) -> None:
        self.honest[event.epoch] = event.is_honest
        if event.is_honest:
            self.honest_keys.add(event.key)

    def on_joined(self, event: seen.Joined) -> None:
        self.life.capacity[event.server] = event.capacity_groups

    def on_confirmed(self, event: seen.Confirmed) -> None:
        self.life.confirmed[event.server] = event.version

    def on_dropped(self, event: seen.Dropped) -> None:
        self.life.confirmed.pop(event.server, None)

    def on_quarantined(self, event: seen.Quarantined) -> None:
        self.life.quarantined.add(event.server)
        self.life.quarantined_keys.add(event.key)

    # --- leases ----------------------------------------------------------------------------------------------------

    def on_granted(self, event: seen.Granted) -> None:
        if event.lease in self.life.running:
            return  # told again
        self.life.running[event.lease] = Running(event.server, event.task, event.min_version)
        self.leases[event.lease] = event.task
        self.life.running_tasks.add(event.task)
        self.life.held[event.server] += 1
        self.tries[event.task] += 1
        self.waiting.pop(event.task, None)
        if event.task > self.newest_task:
            self.newest_task = event.task
            for waiting in self.waiting.values():
                waiting.overtaken += 1

    def on_adopted(self, event: seen.Adopted) -> None:
        self.life.running[event.lease] = Running(event.server, event.task, event.min_version)
        self.life.running_tasks.add(event.task)
        self.life.held[event.server] += 1
        self.tries[event.task] += 1
        self.waiting.pop(event.task, None)

    def on_sampled(self, event: seen.Sampled) -> None:
        self.samples[event.nonce] = event

    def on_accepted(self, event: seen.Accepted) -> None:
        self._close(event.lease)
        self.life.accepted[event.lease] = event.nonce
        self.alive[event.task] = event.nonce

    def on_filtered(self, event: seen.Filtered) -> None:
        self._close(event.lease)
        self.life.accepted[event.lease] = event.nonce
        self.filtered[event.task] = event

    def on_failed(self, event: seen.Failed) -> None:
        self.has_failures = True
        running = self.life.running.get(event.lease)
        if running is not None and running.server == event.server:
            self._give_back(self._close(event.lease))

    def on_refused(self, event: seen.Refused) -> None:
        if event.kind not in NO_FAULT:
            self.has_failures = True
            self._give_back(self._close(event.lease))

    def on_cancelled(self, event: seen.Cancelled) -> None:
        running = self.life.running.get(event.lease)
        if running is not None and running.server == event.server:
            task = self._close(event.lease)
            self.life.given_up[task] += TOO_SLOW in event.reason
            self._give_back(task)

    def on_parked(self, event: seen.Parked) -> None:
        self.has_failures = True
        self.waiting.pop(event.task, None)
        self.life.parked.add(event.task)
        self.parked.add(event.task)

    def on_committed(self, event: seen.Committed) -> None:
        self.safe.update(event.nonces)
        self.safe.update(self.filtered[task].nonce for task in event.filtered)
        self.recorded.update(event.batches)

    def on_answered(self, event: seen.Answered) -> None:
        nonce = self.life.accepted.get(event.lease)
        if nonce is not None and self.leases.get(event.lease) not in self.filtered:
            self.promised[nonce] = event.lease

    # --- training --------------------------------------------------------------------------------------------------

    def on_delivered(self, event: seen.Delivered) -> None:
        self.delivered[event.version] = Batch(event.leases, event.tasks, event.nonces)

    def on_trained(self, event: seen.Trained) -> None:
        self.lineage.append(Batch(event.leases, event.tasks, event.nonces))
        self.trained_tasks.update(event.tasks)
        self.trained_nonces.update(event.nonces)

    def on_published(self, event: seen.Published) -> None:
        self.published = event.version

    def on_checkpointed(self, event: seen.Checkpointed) -> None:
        self.checkpoint = event.version

    def on_calmed(self, event: seen.Calmed) -> None:
        self.is_calm = True
        self.promised_before_calm = set(self.promised)

    # --- how it is done --------------------------------------------------------------------------------------------

    def _close(self, lease: int) -> int:
        running = self.life.running.pop(lease)
        self.life.running_tasks.discard(running.task)
        self.life.held[running.server] -= 1
        return running.task

    def _give_back(self, task: int) -> None:
        self.waiting[task] = Waiting(ahead=len(self.waiting))
