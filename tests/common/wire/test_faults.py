"""A dealer and a router with a bad network between them: nothing crashes, nobody waits for ever, both go on alone."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.keys import ServerKeys, ensure_server_keys
from common.wire import Dealer, Router, curve_keypair, open_dealer, options, sockets
from tests.builders_wire import FRAME_BYTES, SHORT_S, a_client_key, a_router, is_heard
from tests.fault_proxy import FaultProxy, Faults, a_fault_proxy

TIMEOUT_S = 30.0
ASK_AGAIN_S = 0.3
PAYLOAD = bytes(range(256)) * 40


@dataclass
class Pair:
    """A router that echoes, and a dealer that reaches it through a proxy."""

    router: Router
    dealer: Dealer
    proxy: FaultProxy
    numbers: "itertools.count[int]"

    async def talks(self, times: int = 3) -> None:
        """Returns when so many questions were answered, each asked again until it is."""
        for _ in range(times):
            question = b"question %d" % next(self.numbers)
            async with asyncio.timeout(TIMEOUT_S):
                while not await self._asks(question):
                    pass

    async def tries_to_talk(self, seconds: float) -> None:
        """Questions and answers may be lost meanwhile."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await self._asks(b"question %d" % next(self.numbers))

    async def _asks(self, question: bytes) -> bool:
        self.dealer.try_send([question, PAYLOAD])
        try:
            async with asyncio.timeout(ASK_AGAIN_S):
                while True:
                    header, payload = await self.dealer.receive()
                    if bytes(header) == question and bytes(payload) == PAYLOAD:
                        return True
        except TimeoutError:
            return False


async def echo(router: Router) -> None:
    while True:
        for incoming in await router.receive():
            router.send(incoming.peer, incoming.frames)


@pytest.fixture(autouse=True)
def impatient_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken connection is noticed within two seconds instead of ten."""
    monkeypatch.setattr(options, "SILENCE_S", 1.0)
    monkeypatch.setattr(sockets, "LOOK_ANYWAY_S", 0.2)
    monkeypatch.setattr(options, "HANDSHAKE_MS", 1_000)
    monkeypatch.setattr(options, "RECONNECT_MAX_MS", 200)


@pytest.fixture(params=["plain", "encrypted"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> ServerKeys | None:
    return ensure_server_keys(tmp_path / "keys", curve_keypair) if request.param == "encrypted" else None


@asynccontextmanager
async def a_pair(keys: ServerKeys | None, faults: Faults | None = None) -> AsyncIterator[Pair]:
    """faults: on the way to the router, from the first byte on."""
    async with a_router(keys=keys) as router, a_fault_proxy(router.address) as proxy, asyncio.TaskGroup() as tasks:
        proxy.up = faults or Faults()
        key = a_client_key(keys) if keys is not None else None
        async with open_dealer(proxy.address, key=key, max_frame_bytes=FRAME_BYTES) as dealer:
            echoing = tasks.create_task(echo(router))
            yield Pair(router, dealer, proxy, itertools.count())
            echoing.cancel()


async def test_a_pair_whose_connection_is_cut_again_and_again_goes_on_and_nobody_is_blamed(
    keys: ServerKeys | None, caplog: pytest.LogCaptureFixture
):
    async with a_pair(keys) as pair:
        for _ in range(5):
            await pair.talks()
            pair.proxy.cut()
        await pair.talks()
        assert pair.router.refusals() == {}
    assert caplog.messages == []


@pytest.mark.parametrize("cut_at", [0, 1, 10, 11, 63, 64, 66, 264, 500, 5_000])
async def test_a_pair_whose_connection_is_cut_at_any_byte_goes_on(keys: ServerKeys | None, cut_at: int):
    async with a_pair(keys, Faults(cut_at=cut_at)) as pair:
        pair.dealer.try_send([b"question", PAYLOAD])
        async with asyncio.timeout(TIMEOUT_S):
            while pair.proxy.passed["up"] < cut_at or not pair.proxy.num_ended:
                await asyncio.sleep(0.01)
        pair.proxy.heal()
        await pair.talks()


async def test_a_pair_goes_on_after_bits_were_flipped_on_both_ways_and_the_damage_is_counted(keys: ServerKeys | None):
    async with a_pair(keys) as pair:
        await pair.talks()
        for flip_every in (30_000, 1_000, 20):
            pair.proxy.both(Faults(flip_every=flip_every))
            await pair.tries_to_talk(1.0)
            pair.proxy.heal()
            await pair.talks()
        assert pair.proxy.flipped > 10
        assert pair.router.connections_ended > 0
        assert pair.router.refusals().keys() <= {"unheard", "malformed", "stranger", "old_protocol"}


async def test_a_pair_that_a_half_open_connection_parted_finds_together_over_a_new_one(keys: ServerKeys | None):
    async with a_pair(keys) as pair:
        await pair.talks()
        for stuck in (Faults(is_stuck=True), Faults(is_lost=True)):
            pair.proxy.both(stuck)
            await pair.tries_to_talk(2.0)
            pair.proxy.heal()
            await pair.talks()


async def test_a_pair_that_hears_only_one_way_goes_on_when_both_ways_are_open(keys: ServerKeys | None):
    async with a_pair(keys) as pair:
        await pair.talks()
        pair.proxy.down = Faults(is_lost=True)
        await pair.tries_to_talk(2.0)
        pair.proxy.heal()
        await pair.talks()


async def test_a_pair_talks_over_a_slow_and_narrow_way(keys: ServerKeys | None):
    async with a_pair(keys) as pair:
        pair.proxy.both(Faults(delay_s=0.02, bytes_per_s=200_000.0))
        await pair.talks()


async def test_a_handshake_that_trickles_is_given_up_and_tried_again(keys: ServerKeys | None):
    async with a_pair(keys, Faults(bytes_per_s=20.0)) as pair:
        await pair.tries_to_talk(2.5)
        pair.proxy.heal()
        await pair.talks()
        assert pair.router.refusals()["unheard"] > 0


async def test_a_router_that_is_not_reached_for_a_while_is_found_when_it_is(keys: ServerKeys | None):
    async with a_pair(keys) as pair:
        pair.proxy.accepts = False
        pair.proxy.cut()
        await pair.tries_to_talk(1.0)
        pair.proxy.heal()
        await pair.talks()


async def test_a_dealer_whose_address_was_taken_by_another_service_finds_its_router_there_later(
    keys: ServerKeys | None, unused_tcp_port: int
):
    visited = asyncio.Event()

    async def answer_in_http(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()
        visited.set()

    other = await asyncio.start_server(answer_in_http, "127.0.0.1", unused_tcp_port)
    address = f"tcp://127.0.0.1:{unused_tcp_port}"
    key = a_client_key(keys) if keys is not None else None
    async with open_dealer(address, key=key, max_frame_bytes=FRAME_BYTES) as dealer, asyncio.timeout(TIMEOUT_S):
        await visited.wait()
        other.close()
        await other.wait_closed()
        async with a_router(address, keys=keys) as router:
            while not await is_heard(router, dealer, SHORT_S):
                pass
