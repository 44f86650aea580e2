"""One run of the coordinator's rules with many simulated servers that never fail, for its figures."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from common.messages import GroupHeader, TrajectoryHeader
from common.snapshot import NO_VERSION
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import CancelLease, Decision, DeliverBatch, DropServer, GrantLease, RefuseGroup
from learner.coordinator.replay_queue import FinishedGroup
from learner.coordinator.settings import CoordinatorSettings, StaleAction
from tests.simulation.clock import Clock
from tests.simulation.plan import SIGMA

TOKENS_PER_S = 50.0
MAX_GROUP_BYTES = 1 << 16
HEARTBEAT_S = 30.0  # and whenever a version is loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Times are virtual seconds."""

    servers: int
    groups_per_server: int  # at a time
    groups_per_step: int
    steps: int
    stale_action: StaleAction = "wait"
    max_staleness: int = 2
    median_s: float = 20.0  # to sample a group
    max_s: float = 320.0  # no group takes longer: max_new_tokens ends it
    training_s: float = 60.0
    publishing_s: float = 1.0
    pulling_s: float = 2.0
    warmup_steps: int = 4  # that are not counted

    @property
    def capacity(self) -> int:
        """Groups that are sampled at a time, at most."""
        return self.servers * self.groups_per_server

    def length_s(self, task_id: int) -> float:
        """How long a group of the task takes, each time it is sampled."""
        return min(self.max_s, self.median_s * random.Random(task_id).lognormvariate(0.0, SIGMA))

    def with_action(self, action: StaleAction) -> "Scenario":
        return replace(self, stale_action=action)

    def __str__(self) -> str:
        return f"{self.servers} servers of {self.groups_per_server} groups, {self.groups_per_step} a step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Shares, and staleness in policy versions."""

    scenario: Scenario
    learner_idle: float
    places_busy: float
    staleness: float  # mean over trained tokens; likewise its parts
    max_staleness: int
    in_flight: float
    in_queue: float
    never_trained: float  # of the tokens of groups that ended
    cpu_s_per_group: float  # spent by the rules


@dataclass(slots=True)
class Server:
    """One that works."""

    name: str
    loads: list[tuple[float, int]] = field(default_factory=list)  # when, version
    working: dict[int, float] = field(default_factory=dict)  # lease -> when it was begun
    waiting: list[GrantLease] = field(default_factory=list)  # for a version that is not loaded yet

    @property
    def loaded(self) -> int:
        return self.loads[-1][1] if self.loads else NO_VERSION


class Figures:
    """Sums over what happened after the warm-up."""

    def __init__(self) -> None:
        self.idle_s = 0.0
        self.busy_s = 0.0  # of places
        self.since = 0.0
        self.tokens: Counter[tuple[int, int]] = Counter()  # (in flight, in queue) -> trained tokens
        self.wasted = 0
        self.num_groups = 0

    def forget(self, now: float) -> None:
        self.__init__()  # type: ignore[misc]
        self.since = now


class ScalingRun:
    """The coordinator, its servers and its learner around one clock."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        ceiling = (scenario.max_staleness + 1) * scenario.groups_per_step
        self.core = Coordinator(
            CoordinatorSettings(
                groups_per_step=scenario.groups_per_step,
                max_staleness=scenario.max_staleness,
                queue_groups=ceiling,
                queue_bytes=ceiling * MAX_GROUP_BYTES,
                max_group_bytes=MAX_GROUP_BYTES,
                stale_action=scenario.stale_action,
                notice_timeout_s=4 * HEARTBEAT_S,
                server_timeout_s=8 * HEARTBEAT_S,
                hang_timeout_s=1e9,
            )
        )
        self.clock = Clock()
        self.rng = random.Random(0)
        self.figures = Figures()
        self.cpu_s = 0.0
        self.waiting_since = 0.0
        self.trained_tasks: set[int] = set()
        self.servers = {f"server-{index}": Server(f"server-{index}") for index in range(scenario.servers)}

    def tell(self, event: Callable[..., list[Decision]], *arguments: object, **named: object) -> None:
        """Something happens to the rules; carry out what they decide."""
        started_s = time.process_time()
        decisions = event(*arguments, now=self.clock.now, **named)
        self.cpu_s += time.process_time() - started_s
        for decision in decisions:
            match decision:
                case GrantLease():
                    self.begin(self.servers[decision.server_id], decision)
                case CancelLease():
                    self.give_up(self.servers[decision.server_id], decision.lease_id)
                case DeliverBatch():
                    self.train(decision)
                case RefuseGroup() | DropServer():
                    raise AssertionError(f"nothing goes wrong here, and yet: {decision}")

    # --- servers ---------------------------------------------------------------------------------------------------

    def join(self, server: Server) -> None:
        capacity = self.scenario.groups_per_server
        self.tell(
            self.core.server_ready, server.name, capacity_groups=capacity, capacity_bytes=capacity * MAX_GROUP_BYTES
        )
        self.load(server, 0)
        self.clock.after(HEARTBEAT_S * self.rng.random(), self.beat, server)

    def beat(self, server: Server) -> None:
        self.say_alive(server)
        self.clock.after(HEARTBEAT_S, self.beat, server)

    def say_alive(self, server: Server) -> None:
        progress = int(1000 * self.clock.now)
        self.tell(self.core.heartbeat, server.name, progress=progress, loaded_version=server.loaded)

    def load(self, server: Server, version: int) -> None:
        server.loads.append((self.clock.now, version))
        del server.loads[: -2 * self.scenario.max_staleness - 64]
        self.say_alive(server)
        waiting, server.waiting = server.waiting, []
        for grant in waiting:
            self.begin(server, grant)

    def begin(self, server: Server, grant: GrantLease) -> None:
        if grant.min_version > server.loaded:
            server.waiting.append(grant)
            return
        server.working[grant.lease_id] = self.clock.now
        self.clock.after(self.scenario.length_s(grant.task_id), self.finish, server, grant)

    def finish(self, server: Server, grant: GrantLease) -> None:
        if grant.lease_id not in server.working:
            return
        started = server.working.pop(grant.lease_id)
        self.figures.busy_s += self.clock.now - max(started, self.figures.since)
        runs = self.runs(server, started)
        trajectory = TrajectoryHeader(
            num_tokens=sum(length for _, length in runs), reward=0.0, terminated=True, turns=1, version_runs=runs
        )
        group = FinishedGroup(
            header=GroupHeader(lease_id=grant.lease_id, task_id=grant.task_id, trajectories=(trajectory,)),
            payload=b"",
            oldest_version=runs[0][0],
            newest_version=runs[-1][0],
            accepted_version=self.core.version,
        )
        self.tell(self.core.group_finished, server.name, group)

    def give_up(self, server: Server, lease_id: int) -> None:
        server.waiting = [grant for grant in server.waiting if grant.lease_id != lease_id]
        started = server.working.pop(lease_id, self.clock.now)
        self.figures.busy_s += self.clock.now - max(started, self.figures.since)
        self.figures.wasted += int((self.clock.now - started) * TOKENS_PER_S)

    def runs(self, server: Server, started: float) -> tuple[tuple[int, int], ...]:
        """Tokens of each version that the server had loaded meanwhile."""
        ends = [when for when, _ in server.loads[1:]] + [self.clock.now]
        lengths = [
            (version, int((end - max(begin, started)) * TOKENS_PER_S))
            for (begin, version), end in zip(server.loads, ends, strict=True)
            if end > started
        ]
        return tuple(run for run in lengths if run[1]) or ((server.loaded, 1),)

    # --- the learner -----------------------------------------------------------------------------------------------

    def take_batch(self) -> None:
        self.waiting_since = self.clock.now
        self.tell(self.core.take_batch, self.core.version)

    def train(self, batch: DeliverBatch) -> None:
        self.figures.idle_s += self.clock.now - self.waiting_since
        self.clock.after(self.scenario.training_s, self.trained, batch)

    def trained(self, batch: DeliverBatch) -> None:
        for group in batch.groups:
            self.count(group, batch.version)
            self.trained_tasks.add(group.task_id)
        leases = tuple(group.lease_id for group in batch.groups)
        self.tell(self.core.step_completed, batch.version + 1, leases)
        if self.core.version == self.scenario.warmup_steps:
            self.figures.forget(self.clock.now)
        self.clock.after(self.scenario.publishing_s, self.publish, self.core.version)
        self.take_batch()

    def count(self, group: FinishedGroup, trained_version: int) -> None:
        in_queue = trained_version - group.accepted_version
        self.figures.num_groups += 1
        for version, length in group.header.trajectories[0].version_runs:
            if trained_version - version > self.scenario.max_staleness:
                self.figures.wasted += length
            else:
                self.figures.tokens[group.accepted_version - version, in_queue] += length

    def publish(self, version: int) -> None:
        self.tell(self.core.published, version)
        for server in self.servers.values():
            self.clock.after(self.scenario.pulling_s * (0.5 + self.rng.random()), self.load, server, version)

    def outcome(self) -> Outcome:
        figures, scenario = self.figures, self.scenario
        elapsed_s = self.clock.now - figures.since
        trained = figures.tokens.total()
        running = sum(
            self.clock.now - max(started, figures.since)
            for server in self.servers.values()
            for started in server.working.values()
        )
        return Outcome(
            scenario=scenario,
            learner_idle=figures.idle_s / elapsed_s,
            places_busy=(figures.busy_s + running) / (elapsed_s * scenario.capacity),
            staleness=sum((flight + queue) * number for (flight, queue), number in figures.tokens.items()) / trained,
            max_staleness=max(flight + queue for flight, queue in figures.tokens),
            in_flight=sum(flight * number for (flight, _), number in figures.tokens.items()) / trained,
            in_queue=sum(queue * number for (_, queue), number in figures.tokens.items()) / trained,
            never_trained=figures.wasted / (trained + figures.wasted),
            cpu_s_per_group=self.cpu_s / self.core.counts().leased,
        )

    def begin_all(self) -> None:
        """Servers join within a second, then the learner asks for its first batch."""
        self.tell(self.core.published, 0)
        for server in self.servers.values():
            self.clock.after(self.rng.random(), self.join, server)
        self.clock.after(1.0, self.take_batch)

    def go_on(self, stop: Callable[[], bool]) -> None:
        """Until `stop` says so, or the scenario's last step is done."""
        goal = self.scenario.warmup_steps + self.scenario.steps
        self.clock.run(until=1e9, stop=lambda: self.core.version >= goal or stop())


def run(scenario: Scenario) -> Outcome:
    """Simulate `steps` steps after the warm-up."""
    world = ScalingRun(scenario)
    world.begin_all()
    world.go_on(stop=lambda: False)
    return world.outcome()
