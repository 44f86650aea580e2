"""ChunkSources: whom a pull asks for chunks: another server's relay while that is any good, from then on the learner.

Manifests, and with them the digest of every chunk, are the learner's. So a relay can do nothing worse than delay, and
that is bounded: for each relay between this server and the learner it has GRACE_S, and has to give RELAY_BYTES_PER_S
from then on. One that does not is left, for REST_S; one that sends wrong bytes is left for good.
"""

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace

from common.keys import ClientKey
from common.messages import RelayPlace
from common.wire import Dealer, WireError, open_dealer
from rollout_server.pulling import PullState
from rollout_server.snapshot_client import DamagedChunkError, PullGivenUp, SnapshotClient

logger = logging.getLogger(__name__)

PLAN_S = 2.0  # for the coordinator to say where a server that has just joined pulls
GRACE_S = 2.0
RELAY_BYTES_PER_S = 10e6
RELAY_TIMEOUT_S = 0.5  # without any answer, before chunks are asked for again: it has no time to wait longer
REST_S = 60.0
HEADER_BYTES = 1 << 16


class Upstream:
    """Which relay this server shall pull from, and what it knows of relays."""

    def __init__(self, key: ClientKey | None = None) -> None:
        self._key = key
        self._source: RelayPlace | None = None
        self._is_told = asyncio.Event()
        self._is_told.set()
        self._left_until_s: dict[tuple[str, bytes], float] = {}  # by address and key
        self.is_used = False  # this server pulls over the network
        self.pulled_bytes = 0  # from relays
        self.times_left = 0
        self.liars = 0
        self.last_liar = ""  # the server's name

    def __repr__(self) -> str:
        source = f"{self._source.server} at {self._source.address}" if self._source is not None else "the learner"
        return f"<Upstream {source}, {self.pulled_bytes} bytes from relays, {self.times_left} left, {self.liars} lied>"

    def expect_to_be_told(self) -> None:
        """The first pull waits until the coordinator has said where to."""
        self._is_told.clear()

    def tell(self, source: RelayPlace | None) -> None:
        if source != self._source:
            where = f"the relay of {source.server} at {source.address}" if source is not None else "the learner"
            logger.info("weights come from %s", where)
        self._source = source
        self._is_told.set()

    async def settled(self) -> None:
        """Returns when it is known where to pull from, or the coordinator does not say."""
        self.is_used = True
        try:
            async with asyncio.timeout(PLAN_S):
                await self._is_told.wait()
        except TimeoutError:
            logger.info("nobody says which relay weights come from: they come from the learner")
            self._is_told.set()

    @asynccontextmanager
    async def sources(self, client: SnapshotClient, learner: Dealer, max_bytes: int) -> AsyncIterator["ChunkSources"]:
        """For one pull of chunks of up to max_bytes."""
        source = self._source
        async with AsyncExitStack() as stack:
            dealer = None
            if source is not None and time.monotonic() >= self._left_until_s.get((source.address, source.key), 0.0):
                try:
                    dealer = await stack.enter_async_context(self._open(source, max_bytes))
                except WireError as error:
                    self.leave(source, f"it cannot be reached: {error}", rest_s=math.inf)
            yield ChunkSources(self, client, learner, source, dealer)

    def _open(self, source: RelayPlace, max_bytes: int) -> AbstractAsyncContextManager[Dealer]:
        key = replace(self._key, server_public=source.key) if self._key is not None else None
        return open_dealer(source.address, key=key, max_frame_bytes=max_bytes + HEADER_BYTES, linger_ms=0)

    def leave(self, source: RelayPlace, why: str, *, rest_s: float = 0.0, is_lie: bool = False) -> None:
        """What is missing comes from the learner; so does everything for rest_s."""
        self._left_until_s[source.address, source.key] = time.monotonic() + rest_s
        self.times_left += 1
        if is_lie:
            self.liars, self.last_liar = self.liars + 1, source.server
        log = logger.warning if rest_s else logger.info
        log("the relay of %s at %s is left for the learner: %s", source.server, source.address, why)


class ChunkSources:
    """Of one pull."""

    def __init__(
        self,
        upstream: Upstream,
        client: SnapshotClient,
        learner: Dealer,
        source: RelayPlace | None = None,
        relay: Dealer | None = None,
    ) -> None:
        """relay: connected to `source`, where chunks are asked for first; None: the learner is asked for all."""
        self._upstream = upstream
        self._client = client
        self._learner = learner
        self._source = source
        self._relay = relay
        self._began_s = time.monotonic()
        self._learner_timeout_s = 0.0

    async def next_chunk(self, pull: PullState) -> tuple[int, memoryview] | None:
        """Ask for what is to be asked for, and take one answer: (index, bytes) of a verified chunk, or None.

        Raises PullGivenUp when the learner does not have it any more.
        """
        if self._relay is not None:
            self._learner_timeout_s = max(self._learner_timeout_s, pull.timeout_s)
            pull.timeout_s = min(pull.timeout_s, RELAY_TIMEOUT_S)
            assert self._source is not None
            return await self._from_relay(pull, self._relay, self._source)
        try:
            return await self._client.next_chunk(self._learner, pull, pull.timeout_s)
        except DamagedChunkError as error:
            logger.warning("%s", error)
            pull.damaged(error.index, time.monotonic())
        return None

    async def _from_relay(self, pull: PullState, relay: Dealer, source: RelayPlace) -> tuple[int, memoryview] | None:
        left_s = patience_s(pull.num_bytes_received, source.level) - (time.monotonic() - self._began_s)
        if left_s <= 0:
            self._leave(pull, source, f"{pull.num_bytes_received / 1e6:.1f} MB is all that came", rest_s=REST_S)
            return None
        try:
            arrived = await self._client.next_chunk(relay, pull, min(left_s, RELAY_TIMEOUT_S))
        except PullGivenUp:
            self._leave(pull, source, f"it does not hold {pull.manifest.title}")
        except DamagedChunkError as error:
            self._leave(pull, source, f"it sent something else than {error}", rest_s=math.inf, is_lie=True)
        else:
            if arrived is not None:
                self._upstream.pulled_bytes += len(arrived[1])
            return arrived
        return None

    def _leave(
        self, pull: PullState, source: RelayPlace, why: str, *, rest_s: float = 0.0, is_lie: bool = False
    ) -> None:
        self._upstream.leave(source, why, rest_s=rest_s, is_lie=is_lie)
        pull.timeout_s = self._learner_timeout_s
        pull.ask_others(time.monotonic())
        self._relay = None


def patience_s(received_bytes: int, level: int) -> float:
    """After how many seconds a relay must have given more than this. level: relays up to the learner, itself included.

    Those nearer to the learner are given up earlier, so that those behind them need not be.
    """
    return GRACE_S * level + received_bytes / RELAY_BYTES_PER_S
