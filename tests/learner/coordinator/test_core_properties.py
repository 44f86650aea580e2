"""The rules under histories nobody thought of: conservation, bounds, staleness and liveness at every instant."""

import random

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import AcceptGroup, CancelLease, DeliverBatch, GrantLease, ParkTask, Quarantine
from tests.builders_coordinator import MAX_GROUP_BYTES, a_group, some_settings

SERVERS = ("a", "b", "c")


class World:
    """Simulated servers and a learner around the real core; keeps its own account of what should be true."""

    def __init__(self, *, groups_per_step, max_staleness, queue_groups=64, queue_bytes=64 * MAX_GROUP_BYTES):
        self.settings = some_settings(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            queue_groups=queue_groups,
            queue_bytes=queue_bytes,
            max_task_failures=3,
            max_task_losses=5,
        )
        self.core = Coordinator(self.settings)
        self.now = 0.0
        self.open = {}  # lease -> grant, as the servers know them
        self.training = None
        self.sampled_at = {}  # lease -> version, of accepted groups
        self.trained_tasks = []
        self.parked = set()
        self.tell(self.core.published(0, self.now))

    def tell(self, decisions):
        for decision in decisions:
            if isinstance(decision, GrantLease):
                assert decision.lease_id not in self.open
                assert decision.min_version <= self.core.version
                self.open[decision.lease_id] = decision
            elif isinstance(decision, AcceptGroup | CancelLease):
                del self.open[decision.lease_id]
            elif isinstance(decision, DeliverBatch):
                self.training = decision
            elif isinstance(decision, ParkTask):
                self.parked.add(decision.task_id)

    def join(self, server_id, groups=8):
        # Join decisions repeat open leases to a member: the servers know those already.
        for lease_id in [lease_id for lease_id, grant in self.open.items() if grant.server_id == server_id]:
            del self.open[lease_id]
        capacity_bytes = groups * MAX_GROUP_BYTES
        self.tell(
            self.core.server_ready(server_id, capacity_groups=groups, capacity_bytes=capacity_bytes, now=self.now)
        )
        self.beat(server_id)

    def beat(self, server_id):
        """A heartbeat with progress, of a server that has loaded what is published."""
        loaded, progress = self.core.book.published_version, int(self.now * 10)
        self.tell(self.core.heartbeat(server_id, progress=progress, loaded_version=loaded, now=self.now))

    def finish(self, lease_id, sampled_at, payload_bytes=100):
        grant = self.open[lease_id]
        group = a_group(lease_id, grant.task_id, oldest=sampled_at, payload_bytes=payload_bytes)
        decisions = self.core.group_finished(grant.server_id, group, self.now)
        accepted = any(isinstance(decision, AcceptGroup) for decision in decisions)
        assert accepted
        self.sampled_at[lease_id] = sampled_at
        self.tell(decisions)

    def fail(self, lease_id, kind="environment"):
        grant = self.open.pop(lease_id)
        self.tell(self.core.lease_failed(grant.server_id, lease_id, kind, "boom", self.now))

    def ask(self):
        self.tell(self.core.take_batch(self.core.version, self.now))

    def train(self):
        batch, self.training = self.training, None
        assert len(batch.groups) == self.settings.groups_per_step
        for group in batch.groups:
            assert batch.version - self.sampled_at[group.lease_id] <= self.settings.max_staleness
            self.trained_tasks.append(group.task_id)
        lease_ids = tuple(group.lease_id for group in batch.groups)
        self.tell(self.core.step_completed(batch.version + 1, lease_ids, self.now))

    def check(self):
        counts, book, settings = self.core.counts(), self.core.book, self.settings
        assert counts.balanced
        assert set(book.running) == set(self.open)
        assert counts.trained == self.core.version * settings.groups_per_step == len(self.trained_tasks)
        ceiling = (self.core.version + settings.max_staleness + 1) * settings.groups_per_step
        assert counts.running + counts.queued + counts.trained <= ceiling
        assert counts.running + counts.queued <= settings.queue_groups
        assert book.queue.num_bytes + counts.running * settings.max_group_bytes <= settings.queue_bytes
        assert (book.bounds.room > 0) == (book.bounds.held_by() is None)
        for member in book.members.values():
            assert len(member.leases) <= member.capacity_groups
        self.check_that_every_task_is_in_one_place()

    def check_that_every_task_is_in_one_place(self):
        book = self.core.book
        places = [
            *self.trained_tasks,
            *book.queue.task_ids(),
            *(lease.task_id for lease in book.running.values()),
            *book.tasks.given_back(),
            *book.tasks.parked,
        ]
        assert sorted(places) == list(range(book.tasks.next_task_id))


class CoordinatorMachine(RuleBasedStateMachine):
    @initialize(
        groups_per_step=st.integers(1, 4),
        max_staleness=st.integers(0, 3),
        spare_groups=st.integers(0, 8),
        spare_bytes=st.integers(0, 8 * MAX_GROUP_BYTES),
    )
    def start(self, groups_per_step, max_staleness, spare_groups, spare_bytes):
        self.world = World(
            groups_per_step=groups_per_step,
            max_staleness=max_staleness,
            queue_groups=groups_per_step + spare_groups,
            queue_bytes=groups_per_step * MAX_GROUP_BYTES + spare_bytes,
        )
        self.ended = []

    @rule(server=st.sampled_from(SERVERS), groups=st.integers(1, 5))
    def a_server_joins(self, server, groups):
        self.world.join(server, max(groups, len(self.leases_of(server))))

    @precondition(lambda self: self.world.open)
    @rule(data=st.data(), payload_bytes=st.integers(0, 9000))
    def a_group_finishes(self, data, payload_bytes):
        lease_id = data.draw(st.sampled_from(sorted(self.world.open)))
        grant = self.world.open[lease_id]
        loaded = self.world.core.members[grant.server_id].loaded_version
        if grant.min_version <= loaded:
            self.ended.append(grant)
            self.world.finish(lease_id, data.draw(st.integers(grant.min_version, loaded)), payload_bytes)

    @precondition(lambda self: self.world.open)
    @rule(data=st.data(), kind=st.text(max_size=3))
    def a_lease_fails(self, data, kind):
        lease_id = data.draw(st.sampled_from(sorted(self.world.open)))
        self.ended.append(self.world.open[lease_id])
        self.world.fail(lease_id, kind)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def a_group_arrives_that_is_late_or_a_duplicate(self, data):
        grant = data.draw(st.sampled_from(self.ended))
        group = a_group(grant.lease_id, grant.task_id, oldest=grant.min_version)
        before = self.world.core.counts().queued
        decisions = self.world.core.group_finished(grant.server_id, group, self.world.now)
        assert not any(isinstance(decision, AcceptGroup | GrantLease) for decision in decisions)
        assert self.world.core.counts().queued == before

    @precondition(lambda self: self.world.open)
    @rule(data=st.data())
    def a_forged_group_arrives(self, data):
        grant = self.world.open[data.draw(st.sampled_from(sorted(self.world.open)))]
        thief = data.draw(st.sampled_from([name for name in SERVERS if name != grant.server_id]))
        group = a_group(grant.lease_id, grant.task_id, oldest=grant.min_version)
        decisions = self.world.core.group_finished(thief, group, self.world.now)
        assert not any(isinstance(decision, AcceptGroup) for decision in decisions)
        self.world.tell(decisions)

    @rule(server=st.sampled_from(SERVERS), how=st.sampled_from(["left", "lost", "rubbish"]))
    def a_server_goes(self, server, how):
        core, now = self.world.core, self.world.now
        self.ended += self.leases_of(server)
        if how == "left":
            self.world.tell(core.server_left(server, "SIGTERM", now))
        elif how == "lost":
            self.world.tell(core.server_lost(server, "gone", now))
        else:
            decisions = []
            while not any(isinstance(decision, Quarantine) for decision in decisions):
                decisions = core.offence(server, "garbage", now)
                self.world.tell(decisions)

    @rule(seconds=st.floats(0.1, 30.0), alive=st.sets(st.sampled_from(SERVERS)))
    def time_passes(self, seconds, alive):
        before = {name: self.leases_of(name) for name in SERVERS}
        for _ in range(4):
            self.world.now += seconds / 4
            for server in sorted(alive):
                self.world.beat(server)
            self.world.tell(self.world.core.tick(self.world.now))
        self.ended += [grant for leases in before.values() for grant in leases if grant.lease_id not in self.world.open]

    @precondition(lambda self: self.world.training is None)
    @rule()
    def the_learner_asks(self):
        self.world.ask()

    @precondition(lambda self: self.world.training is not None)
    @rule(publish=st.booleans())
    def a_step_is_completed(self, publish):
        self.world.train()
        if publish:
            self.world.tell(self.world.core.published(self.world.core.version, self.world.now))

    @rule()
    def a_frontier_names_everything_that_is_not_trained(self):
        core = self.world.core
        resumed = Coordinator(self.world.settings, version=core.version, frontier=core.frontier())
        tasks = resumed.book.tasks
        untrained = set(tasks.given_back()) | set(tasks.parked)
        assert sorted([*untrained, *self.world.trained_tasks]) == list(range(tasks.next_task_id))
        assert resumed.counts().balanced
        assert resumed.counts().leased == core.counts().leased

    def leases_of(self, server):
        return [grant for grant in self.world.open.values() if grant.server_id == server]

    @invariant()
    def everything_adds_up(self):
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self):
        """No state is dead: a good server and a patient learner get three more steps done from anywhere."""
        if not hasattr(self, "world"):
            return
        world = self.world
        goal = world.core.version + 3
        for _ in range(2000):
            if world.core.version >= goal:
                break
            world.now += 1.0
            world.join("good")
            for server in SERVERS:
                world.beat(server)
            world.tell(world.core.published(world.core.version, world.now))
            for server in list(world.core.members):
                world.beat(server)
            for lease_id, grant in list(world.open.items()):
                if grant.min_version <= world.core.book.published_version:
                    world.finish(lease_id, grant.min_version)
            if world.training is None:
                world.ask()
            if world.training is not None:
                world.train()
            world.check()
        assert world.core.version >= goal


TestCoordinatorMachine = CoordinatorMachine.TestCase
TestCoordinatorMachine.settings = hypothesis_settings(max_examples=100, stateful_step_count=40, deadline=None)


class LongTailedServers:
    """Sample with a version they have loaded when they start, once it is new enough, and take log-normal times."""

    def __init__(self, world, rng):
        self.world = world
        self.rng = rng
        self.ends = {}  # lease -> (time it ends, version it was sampled by)

    def work(self):
        for server in SERVERS:
            self.world.beat(server)
        for lease_id, grant in list(self.world.open.items()):
            self.start(lease_id, grant.min_version)
            if lease_id in self.ends and self.ends[lease_id][0] <= self.world.now:
                self.end(lease_id)

    def start(self, lease_id, min_version):
        published = self.world.core.book.published_version
        if lease_id not in self.ends and min_version <= published:
            duration_s = self.rng.lognormvariate(0.0, 1.0)
            self.ends[lease_id] = (self.world.now + duration_s, self.rng.randint(min_version, published))

    def end(self, lease_id):
        _, sampled_at = self.ends.pop(lease_id)
        if self.rng.random() < 0.1:
            self.world.fail(lease_id)
        else:
            self.world.finish(lease_id, sampled_at)


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 5])
def test_no_token_is_over_the_bound_whatever_the_lengths_and_failures(max_staleness):
    rng = random.Random(max_staleness)
    world = World(groups_per_step=4, max_staleness=max_staleness)
    servers = LongTailedServers(world, rng)
    for server in SERVERS:
        world.join(server, groups=16)
    worst = 0
    while world.core.version < 60:
        world.now += 0.1
        servers.work()
        if world.training is None:
            world.ask()
        elif rng.random() < 0.2:
            ages = [world.training.version - world.sampled_at[group.lease_id] for group in world.training.groups]
            worst = max(worst, *ages)
            world.train()
            world.tell(world.core.published(world.core.version, world.now))
        world.check()
    assert worst == max_staleness  # the bound is kept, and it is used
