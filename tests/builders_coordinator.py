"""Builders for the coordinator's tests: valid by default, every value can be overridden."""

from typing import TypeVar

from common.messages import GroupHeader, TrajectoryHeader
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import Decision, GrantLease
from learner.coordinator.replay_queue import FinishedGroup
from learner.coordinator.settings import CoordinatorSettings

D = TypeVar("D", bound=Decision)

MAX_GROUP_BYTES = 10_000


def some_settings(**overrides: object) -> CoordinatorSettings:
    values: dict[str, object] = {
        "groups_per_step": 2,
        "max_staleness": 1,
        "queue_groups": 100,
        "queue_bytes": 100 * MAX_GROUP_BYTES,
        "max_group_bytes": MAX_GROUP_BYTES,
    }
    return CoordinatorSettings(**(values | overrides))  # type: ignore[arg-type]


def a_coordinator(**overrides: object) -> Coordinator:
    """At version 0, published, nobody there."""
    coordinator = Coordinator(some_settings(**overrides))
    coordinator.published(0, now=0.0)
    return coordinator


def a_group(
    lease_id: int = 0, task_id: int | None = None, *, oldest: int = 0, newest: int | None = None, payload_bytes: int = 0
) -> FinishedGroup:
    """By default of the task that has the lease's number, as long as nothing failed."""
    newest = oldest if newest is None else newest
    trajectory = TrajectoryHeader(num_tokens=2, reward=1.0, terminated=True, turns=1, version_runs=((oldest, 1),))
    header = GroupHeader(
        lease_id=lease_id, task_id=lease_id if task_id is None else task_id, trajectories=(trajectory,)
    )
    return FinishedGroup(header=header, payload=bytes(payload_bytes), oldest_version=oldest, newest_version=newest)


def group_for(grant: GrantLease, *, sampled_at: int | None = None, payload_bytes: int = 0) -> FinishedGroup:
    version = grant.min_version if sampled_at is None else sampled_at
    return a_group(grant.lease_id, grant.task_id, oldest=version, payload_bytes=payload_bytes)


def join(
    coordinator: Coordinator, server_id: str = "a", *, groups: int = 100, num_bytes: int = 1 << 30, now: float = 0.0
) -> list[GrantLease]:
    """The server becomes ready; returns the leases granted to anybody."""
    return grants(coordinator.server_ready(server_id, capacity_groups=groups, capacity_bytes=num_bytes, now=now))


def grants(decisions: list[Decision]) -> list[GrantLease]:
    return [decision for decision in decisions if isinstance(decision, GrantLease)]


def of_kind(decisions: list[Decision], kind: type[D]) -> list[D]:
    return [decision for decision in decisions if isinstance(decision, kind)]
