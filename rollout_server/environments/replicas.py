"""Which of several servers of one environment an episode begins at."""

import asyncio
from collections.abc import Sequence
from typing import Protocol, TypeVar

from rollout_server.environments.capacity import Capacity
from rollout_server.environments.environment import EnvironmentFailure
from rollout_server.environments.health import Health

LOOK_EVERY_S = 0.02


class Replica(Protocol):
    """One server."""

    health: Health
    capacity: Capacity


AnyReplica = TypeVar("AnyReplica", bound=Replica)


async def least_busy(replicas: Sequence[AnyReplica], *, deadline: float) -> AnyReplica:
    """The least busy server that may be tried now, by the loop's clock; raises EnvironmentFailure while all are down.

    While one is being tried again, its answer is waited for: the samples of a group come together, and if one of them
    failed it would take the others with it.
    """
    loop = asyncio.get_running_loop()
    while True:
        for replica in sorted(replicas, key=lambda one: one.capacity.load):
            if replica.health.admit(loop.time()):
                return replica
        if loop.time() >= deadline or not any(replica.health.is_being_tried for replica in replicas):
            reasons = "; ".join(replica.health.last_failure for replica in replicas)
            raise EnvironmentFailure("environment_unavailable", reasons)
        await asyncio.sleep(LOOK_EVERY_S)
