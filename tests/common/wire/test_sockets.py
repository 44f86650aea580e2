import asyncio
import os
import select
import socket as stdlib_socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from common.wire import Dealer, Router, SendResult, open_dealer, options, sockets
from tests.builders_wire import SHORT_S, TIMEOUT_S, a_router, is_heard


@pytest.fixture
def no_watchdog(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sockets are looked at when their descriptor says so, and at no other time."""
    monkeypatch.setattr(sockets, "LOOK_ANYWAY_S", 1000.0)


async def test_messages_go_both_ways():
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.timeout(TIMEOUT_S):
        await dealer.send([b"question", b""])
        [incoming] = await router.receive()
        assert (incoming.frames, incoming.peer.key) == ([b"question", b""], "")
        assert router.send(incoming.peer, [b"answer", b"x" * 100_000]) is SendResult.SENT
        header, payload = await dealer.receive()
        assert (header, bytes(payload)) == (b"answer", b"x" * 100_000)


async def test_a_local_socket_is_a_path(tmp_path: Path):
    async with a_router(f"ipc://{tmp_path}/s") as router, open_dealer(router.address) as dealer:
        assert await is_heard(router, dealer)


async def test_a_dealer_may_start_before_its_router():
    with stdlib_socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with open_dealer(f"tcp://127.0.0.1:{port}") as dealer:
        dealer.try_send([b"early", b""])
        async with a_router(dealer.address) as router, asyncio.timeout(TIMEOUT_S):
            assert (await router.receive())[0].frames == [b"early", b""]


async def test_a_dealer_finds_its_router_again_after_a_restart():
    async with a_router() as first:
        address = first.address
    async with open_dealer(address) as dealer:
        for _ in range(2):
            async with a_router(address) as router:
                assert await is_heard(router, dealer)


async def echo(router: Router, count: int) -> None:
    echoed = 0
    while echoed < count:
        for incoming in await router.receive():
            while router.send(incoming.peer, incoming.frames) is SendResult.FULL:
                await asyncio.sleep(0)
            echoed += 1


async def talk(count: int) -> None:
    async def ask(dealer: Dealer) -> None:
        for number in range(count):
            await dealer.send([b"%d" % number, b""])

    async def listen(dealer: Dealer) -> None:
        for number in range(count):
            assert (await dealer.receive())[0] == b"%d" % number

    async with (
        a_router() as router,
        open_dealer(router.address) as dealer,
        asyncio.timeout(60),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(echo(router, count))
        tasks.create_task(ask(dealer))
        tasks.create_task(listen(dealer))


@pytest.mark.usefixtures("no_watchdog")
@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_no_wake_up_is_lost_among_many_messages_both_ways(run: Callable[..., None]):
    run(talk(20_000))


@pytest.mark.usefixtures("no_watchdog")
async def test_no_wake_up_is_lost_when_one_message_is_under_way_at_a_time():
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.TaskGroup() as tasks:
        tasks.create_task(echo(router, 2000))
        async with asyncio.timeout(30):
            for number in range(2000):
                dealer.try_send([b"%d" % number, b""])
                assert (await dealer.receive())[0] == b"%d" % number


@pytest.mark.usefixtures("no_watchdog")
async def test_a_message_that_arrives_before_something_is_sent_does_not_wait_for_the_next_one():
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.timeout(TIMEOUT_S):
        dealer.try_send([b"hello", b""])
        [hello] = await router.receive()
        router.send(hello.peer, [b"answer", b""])
        await dealer.receive()
        hearing = asyncio.ensure_future(router.receive())
        await asyncio.sleep(0.05)
        dealer.try_send([b"header", b""])
        assert select.select([router._socket.FD], [], [], TIMEOUT_S)[0]  # there, and the event loop has not seen it
        router.send(hello.peer, [b"answer", b""])  # which takes the notice away
        assert len(await hearing) == 1


async def test_a_wake_up_that_is_lost_nevertheless_costs_a_second(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "LOOK_ANYWAY_S", 0.2)
    async with a_router() as router, open_dealer(router.address) as dealer:
        asyncio.get_running_loop().remove_reader(router._socket.FD)
        async with asyncio.timeout(TIMEOUT_S):
            hearing = asyncio.ensure_future(router.receive())
            await asyncio.sleep(0.05)
            dealer.try_send([b"header", b""])
            assert len(await hearing) == 1


async def test_a_message_that_waits_to_be_read_keeps_nobody_busy():
    async with a_router() as router, open_dealer(router.address) as dealer:
        dealer.try_send([b"header", b"payload"])
        await asyncio.sleep(0.1)
        cpu_s = time.thread_time()
        await asyncio.sleep(0.5)
        assert time.thread_time() - cpu_s < 0.1
        assert len(await router.receive()) == 1


@pytest.mark.usefixtures("no_watchdog")
async def test_a_sender_that_waits_for_room_goes_on_as_soon_as_there_is_some():
    async def send(dealer: Dealer) -> None:
        for _ in range(200):
            await dealer.send([b"", bytes(100_000)])

    async with (
        a_router() as router,
        open_dealer(router.address) as dealer,
        asyncio.timeout(30),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(send(dealer))
        received = 0
        while received < 200:
            received += len(await router.receive())


@pytest.mark.usefixtures("no_watchdog")
async def test_room_that_appears_just_after_a_send_found_none_is_used(monkeypatch: pytest.MonkeyPatch):
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.timeout(TIMEOUT_S):
        outcomes = [SendResult.FULL, SendResult.SENT]

        def send_now(_frames: object) -> SendResult:
            dealer._writable.set()
            return outcomes.pop(0)

        monkeypatch.setattr(dealer, "_send_now", send_now)
        await dealer.send([b"header", b""])
        assert outcomes == []


async def test_a_receiver_that_is_cancelled_again_and_again_misses_nothing():
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.timeout(60):
        dealer.try_send([b"hello", b""])
        [hello] = await router.receive()
        received: list[int] = []
        for number in range(3000):
            router.send(hello.peer, [b"%d" % number, b""])
            with suppress(TimeoutError):
                async with asyncio.timeout(0):
                    received.append(int(bytes((await dealer.receive())[0])))
        while len(received) < 3000:
            received.append(int(bytes((await dealer.receive())[0])))
        assert received == list(range(3000))


async def test_sending_to_a_peer_that_left_says_so():
    async with a_router() as router:
        async with open_dealer(router.address) as dealer, asyncio.timeout(TIMEOUT_S):
            await dealer.send([b"hello", b""])
            [incoming] = await router.receive()
        async with asyncio.timeout(TIMEOUT_S):
            while router.send(incoming.peer, [b"answer", b""]) is not SendResult.GONE:
                await asyncio.sleep(0.01)


async def test_a_peer_that_does_not_read_fills_up_and_nothing_is_lost():
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.timeout(30):
        await dealer.send([b"hello", b""])
        [incoming] = await router.receive()
        sent = 0
        while (result := router.send(incoming.peer, [b"%d" % sent, b"x" * 10_000])) is SendResult.SENT:
            sent += 1
        assert result is SendResult.FULL
        for number in range(sent):
            assert (await dealer.receive())[0] == b"%d" % number


async def test_a_message_of_another_number_of_frames_is_dropped_and_counted():
    async with a_router() as router, open_dealer(router.address) as dealer:
        dealer.try_send([b"one"])
        dealer.try_send([b"one", b"two", b"three"])
        assert await is_heard(router, dealer)
        assert repr(router) == f"<Router {router.address}, 2 malformed>"


async def test_a_message_of_very_many_frames_is_dropped_a_piece_at_a_time_and_not_kept():
    async with a_router() as router, open_dealer(router.address) as dealer:
        dealer.try_send([b"x"] * 50_000)
        dealer.try_send([b"header", b"payload"])
        hearing = asyncio.ensure_future(router.receive())
        turns, most_kept = 0, 0
        async with asyncio.timeout(TIMEOUT_S):
            while not hearing.done():
                await asyncio.sleep(0)
                turns, most_kept = turns + 1, max(most_kept, len(router._parts))
        assert (hearing.result()[0].frames, router.malformed) == ([b"header", b"payload"], 1)
        assert turns > 100
        assert most_kept == 4


async def test_a_frame_over_the_limit_never_arrives():
    async with a_router(max_frame_bytes=1000) as router, open_dealer(router.address) as dealer:
        dealer.try_send([b"header", b"x" * 1000])
        async with asyncio.timeout(TIMEOUT_S):
            assert len(await router.receive()) == 1
        dealer.try_send([b"header", b"x" * 1001])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SHORT_S):
                await router.receive()


def test_no_descriptor_stays_open():
    async def once() -> None:
        async with a_router() as router, open_dealer(router.address) as dealer:
            assert await is_heard(router, dealer)

    asyncio.run(once())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(once())
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_dealer_on_a_path_keeps_its_connection_though_nobody_answers(tmp_path, monkeypatch):
    """Its router knows it by that."""
    monkeypatch.setattr(options, "SILENCE_S", 0.1)
    monkeypatch.setattr(sockets, "LOOK_ANYWAY_S", 0.05)
    async with a_router(f"ipc://{tmp_path}/socket") as router, open_dealer(router.address) as dealer:
        peers = set()
        async with asyncio.timeout(TIMEOUT_S):
            for _ in range(5):
                await dealer.send([b"header", b"payload"])
                [incoming] = await router.receive()
                peers.add(incoming.peer)
                await asyncio.sleep(0.1)
        assert len(peers) == 1
