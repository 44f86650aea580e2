"""World: servers, network, coordinator and learner around one clock; and a history of what they did."""

import logging
import random

from learner.coordinator.ledger import decode_frontier
from learner.coordinator.messages import OpenRun
from learner.coordinator.service_settings import HeldOut, ServiceSettings
from tests.builders_coordinator import some_service_settings
from tests.simulation import history as seen
from tests.simulation.clock import Clock
from tests.simulation.coordinator import SimulatedCoordinator
from tests.simulation.faults import Faults
from tests.simulation.history import History
from tests.simulation.journal import SimulatedJournal
from tests.simulation.learner import SimulatedLearner
from tests.simulation.network import Line
from tests.simulation.plan import SIGMA, Plan
from tests.simulation.server import SimulatedServer

BOOT_S = 0.3  # of a coordinator
NOTICE_S = 0.05  # until the learner starts another one
MAX_CALM_S = 400.0
MIN_CALM_STEPS = 3

BREAKAGES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)


class World:
    """Everything that happens in one history, from its plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rng = random.Random(f"history {plan.seed}")
        self.clock = Clock()
        self.history = History()
        self.note = self.history.note
        self.journal = SimulatedJournal()
        self.coordinator: SimulatedCoordinator | None = None
        self._lives = 0
        self._num_connections = 0
        self._num_nonces = 0
        self._lengths: dict[int, float] = {}
        self._outage_until = 0.0
        self._failing = plan.failing
        self._is_calm = False
        self.note(seen.Planned(0.0, plan))
        self.learner = SimulatedLearner(self)
        self.servers = [SimulatedServer(self, server) for server in plan.servers]
        self.learner.start()
        self._faults = Faults(self)
        for when, kind in plan.faults:
            self.clock.at(when, self._go_wrong, kind)

    # --- what its parts need of it ---------------------------------------------------------------------------------

    @property
    def service_settings(self) -> ServiceSettings:
        lineage, evaluation = self.learner.lineage, self.plan.rules.evaluation
        held_out = HeldOut(samples=evaluation.samples if evaluation else 1, temperature=0.0, hold_s=self.plan.hold_s)
        return some_service_settings(
            rules=self.plan.rules, run_id=self.run_id(lineage), lease_secret=f"{lineage:064x}", group_size=2,
            evaluation=held_out if evaluation else None,
        )  # fmt: skip

    def run_id(self, lineage: int) -> str:
        return f"run.{lineage}"

    def lines(self) -> list[Line]:
        return [server.process.line for server in self.servers if server.process is not None]

    def new_routing_id(self) -> bytes:
        self._num_connections += 1
        return self._num_connections.to_bytes(5, "big")

    def new_nonce(self) -> int:
        self._num_nonces += 1
        return self._num_nonces

    def length_of(self, task: int) -> float:
        """A task that takes long takes long again: log-normal, the median is 1, and p99 is ten times that."""
        if task not in self._lengths:
            self._lengths[task] = random.Random(f"{self.plan.seed} {task}").lognormvariate(0.0, SIGMA)
        return self._lengths[task]

    def is_equal(self, task: int) -> bool:
        """A task that is too easy, or too hard, is so again."""
        return random.Random(f"{self.plan.seed} equal {task}").random() < self.plan.equal

    def failing(self) -> float:
        """The share of leases that fail now."""
        return 1.0 if self.clock.now < self._outage_until else self._failing

    def open_coordinator(self, run: OpenRun) -> None:
        """Start a process and tell it where the run is; it reads that once it is up."""
        self._lives += 1
        self.clock.after(BOOT_S * (0.5 + self.rng.random()), self._booted, run, self._lives)

    def _booted(self, run: OpenRun, life: int) -> None:
        if self.learner.is_alive and life == self._lives:
            self.coordinator = SimulatedCoordinator(self, run, life=life)
            self.coordinator.start()

    def end_coordinator(self, coordinator: SimulatedCoordinator | None) -> None:
        """SIGKILL. The learner, if it lives, starts another one."""
        if coordinator is None or not coordinator.is_alive:
            return
        coordinator.crash()
        self.coordinator = None
        self.clock.after(NOTICE_S, self.learner.reopen)

    def slow_disk(self, commit_s: float) -> None:
        if self.coordinator is not None:
            self.coordinator.disk_s = commit_s

    def outage(self, duration_s: float) -> None:
        self._outage_until = self.clock.now + duration_s

    # --- the history -----------------------------------------------------------------------------------------------

    def run(self) -> History:
        """Chaos, then calm, in which everything must go on by itself."""
        try:
            self.clock.run(until=self.plan.chaos_s, stop=self._is_long_enough)
            self._calm()
            rules = self.plan.rules
            goal = self.learner.highest_version + max(MIN_CALM_STEPS, rules.max_staleness + 2)
            until = self.clock.now + MAX_CALM_S
            is_finished = self.clock.run(until=until, stop=lambda: self._version() >= goal)
            self._end(is_finished)
        except BREAKAGES as error:
            self.note(seen.Broke(self.clock.now, f"{type(error).__name__}: {error}"))
        return self.history

    def _version(self) -> int:
        return self.coordinator.core.version if self.coordinator is not None else 0

    def _is_long_enough(self) -> bool:
        return self.learner.version >= self.plan.chaos_steps

    def _go_wrong(self, kind: str) -> None:
        if not self._is_calm:
            self._faults.happen(kind)

    def _calm(self) -> None:
        self._is_calm = True
        self._outage_until, self._failing = self.clock.now, 0.0
        self.slow_disk(self.plan.commit_s)
        self.note(seen.Calmed(self.clock.now, self.learner.version))

    def _end(self, is_finished: bool) -> None:
        core = self.coordinator.core if self.coordinator is not None else None
        if core is None:
            self.note(seen.Ended(self.clock.now, self.learner.version, False, 0, (), (), ()))
            return
        state = decode_frontier(core.frontier(), version=core.version, source=self.plan.rules.source)
        open_tasks = tuple(task.task_id for task in state.open_tasks)
        repeated = (group.lease_id for batch in core.book.batches.recorded.values() for group in batch)
        queued = (*core.book.queue.lease_ids(), *repeated)
        self.note(
            seen.Ended(
                self.clock.now, self.learner.version, is_finished, state.next_task_id, open_tasks,
                tuple(state.parked), queued,
            )
        )  # fmt: skip


def simulate(plan: Plan) -> History:
    """The history of a plan: the same one every time."""
    log = logging.getLogger("learner.coordinator")
    level = log.level
    log.setLevel(logging.CRITICAL)  # liars would fill the screen
    try:
        return World(plan).run()
    finally:
        log.setLevel(level)
