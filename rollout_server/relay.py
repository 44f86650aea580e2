"""Relay: gives on to other rollout servers what this one has pulled, on a thread of its own, to those it is told to.

It answers requests for chunks alone; their digests are in the learner's manifests, which nobody takes from a relay.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager

from common.keys import ClientKey, GivenKeys, RelayKeys
from common.messages import RelayPlan
from common.metrics import Measurement
from common.snapshot_answers import MAX_REQUEST_BYTES, answer_requests
from common.wire import curve_keypair, open_router
from rollout_server.chunk_sources import Upstream
from rollout_server.pulling import CHUNKS_IN_FLIGHT
from rollout_server.relay_shelf import RelayShelf

logger = logging.getLogger(__name__)

ANSWERS_IN_FLIGHT = 2 * CHUNKS_IN_FLIGHT  # chunks that wait in memory for one who pulls; more are thrown away


class Relaying:
    """This server's part in giving weights on: where its own come from, what it has, and who may pull it here."""

    def __init__(self, key: ClientKey | None = None) -> None:
        self.key = key
        self.upstream = Upstream(key)
        self.shelf = RelayShelf()
        self.admitted = GivenKeys()
        self.address = ""
        self.public_key = b""

    def __repr__(self) -> str:
        return f"<Relaying at {self.address or 'nowhere'} {self.shelf!r} to {self.admitted!r}, {self.upstream!r}>"

    @property
    def offered_at(self) -> str:
        """The address for others; none while this server has its weights through shared memory, and holds none."""
        return self.address if self.upstream.is_used else ""

    def metrics(self) -> Iterator[Measurement]:
        """What Prometheus is told."""
        upstream = self.upstream
        yield Measurement(name="relayed_bytes_total", value=self.shelf.given_bytes, help="of snapshots, to others")
        yield Measurement(name="relay_bytes_total", value=upstream.pulled_bytes, help="of snapshots, from others")
        yield Measurement(name="relays_left_total", value=upstream.times_left, help="for the learner, in a pull")
        yield Measurement(name="lying_relays_total", value=upstream.liars, help="they sent wrong bytes")

    def follow(self, plan: RelayPlan) -> None:
        self.admitted.replace(plan.admitted)
        self.upstream.tell(plan.source)


@asynccontextmanager
async def open_relay(relaying: Relaying, listen: str) -> AsyncIterator[None]:
    """Gives on inside, at `listen`, on a thread. Raises WireError where it cannot listen."""
    keys = None
    if relaying.key is not None:
        public, secret = curve_keypair()
        keys = RelayKeys(public=public, secret=secret, allowed=relaying.admitted)
        relaying.public_key = public
    bound: Future[None] = Future()
    stopped: Future[None] = Future()
    with ThreadPoolExecutor(1, thread_name_prefix="relay") as thread:
        serving = asyncio.wrap_future(thread.submit(asyncio.run, _serve(relaying, listen, keys, bound, stopped)))
        try:
            await asyncio.wait({serving, asyncio.wrap_future(bound)}, return_when=asyncio.FIRST_COMPLETED)
            if serving.done():
                serving.result()
            relaying.shelf.is_open = True
            relaying.upstream.expect_to_be_told()
            logger.info("other rollout servers may pull weights at %s", relaying.address)
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(_until_it_fails(serving))
                yield
                watching.cancel()
        finally:
            relaying.shelf.is_open = False
            logger.info("gave %.1f kB of weights to other rollout servers", relaying.shelf.given_bytes / 1e3)
            stopped.set_result(None)
            await asyncio.wait({serving})


async def _serve(
    relaying: Relaying, listen: str, keys: RelayKeys | None, bound: Future[None], stopped: Future[None]
) -> None:
    """In the thread's own event loop."""
    queue = {"max_frame_bytes": MAX_REQUEST_BYTES, "send_queue_messages": ANSWERS_IN_FLIGHT}
    async with open_router(listen, keys=keys, **queue) as router, asyncio.TaskGroup() as tasks:
        answering = tasks.create_task(answer_requests(router, relaying.shelf))
        relaying.address = router.address
        bound.set_result(None)
        await asyncio.wrap_future(stopped)
        answering.cancel()


async def _until_it_fails(serving: asyncio.Future[None]) -> None:
    await asyncio.wait({serving})
    serving.result()
