"""NearestSnapshots: through shared memory where the learner is on this host, over ZeroMQ from everywhere else."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal

from common.shared_slots import NotSharedError
from common.wire import Dealer
from rollout_server.mapped_snapshots import MappedSnapshots
from rollout_server.pulled_snapshots import PulledSnapshots
from rollout_server.relay import Relaying
from rollout_server.snapshot_client import SnapshotClient
from rollout_server.snapshot_transport import ArrivedSnapshot, SnapshotTransport, WeightTarget

logger = logging.getLogger(__name__)

TransportName = Literal["nearest", "zeromq", "shared_memory"]


class NearestSnapshots:
    """A SnapshotTransport that chooses one of the two, anew for each life of the run."""

    def __init__(self, target: WeightTarget, client: SnapshotClient, relaying: Relaying) -> None:
        self._target = target
        self._mapped = MappedSnapshots(target, client, relaying)
        self._pulled = PulledSnapshots(target, client, relaying)
        self._run_id = ""  # that the choice was made for
        self._chosen: SnapshotTransport = self._mapped

    def __repr__(self) -> str:
        return f"<NearestSnapshots: {self._chosen!r}>"

    def forget(self) -> None:
        self._chosen.forget()

    def close(self) -> None:
        self._mapped.close()
        self._pulled.close()

    @asynccontextmanager
    async def next_version(self, dealer: Dealer) -> AsyncIterator[ArrivedSnapshot | None]:
        """See SnapshotTransport."""
        async with AsyncExitStack() as stack:
            yield await self._enter(stack, dealer)

    async def _enter(self, stack: AsyncExitStack, dealer: Dealer) -> ArrivedSnapshot | None:
        if self._run_id != self._target.run_id:
            self._run_id, self._chosen = self._target.run_id, self._mapped
        if self._chosen is self._mapped:
            try:
                return await stack.enter_async_context(self._mapped.next_version(dealer))
            except NotSharedError as reason:
                logger.info("weights come over %s: %s", dealer.address, reason)
                self._chosen = self._pulled
        return await stack.enter_async_context(self._pulled.next_version(dealer))


OpenTransport = Callable[[WeightTarget, SnapshotClient, Relaying], SnapshotTransport]

TRANSPORTS: Mapping[TransportName, OpenTransport] = {
    "nearest": NearestSnapshots,
    "zeromq": PulledSnapshots,
    "shared_memory": MappedSnapshots,
}
