"""Which of several servers of one environment an episode begins at, and its place there."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol, TypeVar

from common.environments import EnvironmentSettings
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


@asynccontextmanager
async def place_at(
    replica: Replica, address: str, settings: EnvironmentSettings, *, deadline: float
) -> AsyncIterator[None]:
    """One of the episodes that the server may have at once; raises EnvironmentFailure when none ends in time."""
    async with AsyncExitStack() as stack:
        timeout_s = max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            await stack.enter_async_context(replica.capacity.slot(timeout_s=timeout_s))
        except TimeoutError as error:
            reason = (
                f"{settings.max_concurrent} episodes are under way (max_concurrent), and none ended within "
                f"{settings.capacity_timeout_s:g} s (capacity_timeout_s)"
            )
            raise EnvironmentFailure("environment_unavailable", f"{address}: {reason}") from error
        yield
