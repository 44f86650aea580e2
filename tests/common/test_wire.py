import asyncio
import os
import socket as stdlib_socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from common.keys import ClientKey, ServerKeys, ensure_client_key, ensure_server_keys, load_client_key
from common.wire import Dealer, Router, SendResult, WireError, curve_keypair, is_local, open_dealer, open_router

TIMEOUT_S = 10.0
SHORT_S = 1.5  # long enough for a handshake that is going to be refused

FRAME_BYTES = 1 << 20


@pytest.fixture
def keys(tmp_path: Path) -> ServerKeys:
    return ensure_server_keys(tmp_path / "keys", curve_keypair)


def a_client_key(keys: ServerKeys, name: str = "node") -> ClientKey:
    return load_client_key(ensure_client_key(keys, name, curve_keypair))


@asynccontextmanager
async def a_router(**options: object) -> AsyncIterator[Router]:
    async with open_router("tcp://127.0.0.1:0", **{"max_frame_bytes": FRAME_BYTES, **options}) as router:  # type: ignore[arg-type]
        yield router


async def is_heard(router: Router, dealer: Dealer, within_s: float = TIMEOUT_S) -> bool:
    dealer.try_send([b"header", b"payload"])
    try:
        async with asyncio.timeout(within_s):
            return (await router.receive())[0].frames == [b"header", b"payload"]
    except TimeoutError:
        return False


async def test_messages_go_both_ways():
    async with a_router() as router, open_dealer(router.address) as dealer, asyncio.timeout(TIMEOUT_S):
        await dealer.send([b"question", b""])
        [incoming] = await router.receive()
        assert (incoming.frames, incoming.peer.key) == ([b"question", b""], "")
        assert router.send(incoming.peer, [b"answer", b"x" * 100_000]) is SendResult.SENT
        header, payload = await dealer.receive()
        assert (header, bytes(payload)) == (b"answer", b"x" * 100_000)


async def test_a_local_socket_is_a_path(tmp_path: Path):
    async with (
        open_router(f"ipc://{tmp_path}/s", max_frame_bytes=FRAME_BYTES) as router,
        open_dealer(router.address) as dealer,
    ):
        assert await is_heard(router, dealer)


async def test_a_dealer_may_start_before_its_router():
    with stdlib_socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    async with open_dealer(f"tcp://127.0.0.1:{port}") as dealer:
        dealer.try_send([b"early", b""])
        async with open_router(dealer.address, max_frame_bytes=FRAME_BYTES) as router, asyncio.timeout(TIMEOUT_S):
            assert (await router.receive())[0].frames == [b"early", b""]


async def test_no_wake_up_is_lost_among_many_messages_both_ways():
    count = 20_000

    async def echo(router: Router) -> None:
        echoed = 0
        while echoed < count:
            for incoming in await router.receive():
                while router.send(incoming.peer, incoming.frames) is SendResult.FULL:
                    await asyncio.sleep(0)
                echoed += 1

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
        tasks.create_task(echo(router))
        tasks.create_task(ask(dealer))
        tasks.create_task(listen(dealer))


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
        while router.send(incoming.peer, [b"%d" % sent, b"x" * 10_000]) is SendResult.SENT:
            sent += 1
        for number in range(sent):
            assert (await dealer.receive())[0] == b"%d" % number


async def test_a_message_of_another_number_of_frames_is_dropped_and_counted():
    async with a_router() as router, open_dealer(router.address) as dealer:
        dealer.try_send([b"one"])
        dealer.try_send([b"one", b"two", b"three"])
        assert await is_heard(router, dealer)
        assert router.malformed == 2


async def test_a_frame_over_the_limit_never_arrives():
    async with a_router(max_frame_bytes=1000) as router, open_dealer(router.address) as dealer:
        dealer.try_send([b"header", b"x" * 1001])
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_key_on_the_allow_list_is_let_in_and_is_the_peers_identity(keys: ServerKeys):
    key = a_client_key(keys)
    async with a_router(keys=keys) as router, open_dealer(router.address, key=key) as dealer:
        dealer.try_send([b"hello", b""])
        async with asyncio.timeout(TIMEOUT_S):
            [incoming] = await router.receive()
        assert incoming.peer.key == key.public.hex()


async def test_a_strangers_key_is_refused(keys: ServerKeys):
    public, secret = curve_keypair()
    stranger = ClientKey(public=public, secret=secret, server_public=keys.public)
    async with a_router(keys=keys) as router, open_dealer(router.address, key=stranger) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_peer_without_a_key_is_refused(keys: ServerKeys):
    async with a_router(keys=keys) as router, open_dealer(router.address) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_server_that_is_not_the_expected_one_is_not_talked_to(keys: ServerKeys):
    key = a_client_key(keys)
    other = ClientKey(public=key.public, secret=key.secret, server_public=curve_keypair()[0])
    async with a_router(keys=keys) as router, open_dealer(router.address, key=other) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_revoked_key_is_refused_and_a_new_one_is_let_in_while_running(keys: ServerKeys):
    revoked = a_client_key(keys)
    (keys.directory / "allowed" / "node.pub").unlink()
    async with a_router(keys=keys) as router:
        async with open_dealer(router.address, key=revoked) as dealer:
            assert not await is_heard(router, dealer, SHORT_S)
        async with open_dealer(router.address, key=a_client_key(keys, "newcomer")) as dealer:
            assert await is_heard(router, dealer)


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 4096, b"\xff\0\0\0\0\0\0\0\1\x7f" + bytes(54)]
)
async def test_garbage_on_the_port_does_not_disturb_a_legitimate_peer(keys: ServerKeys, garbage: bytes):
    async with a_router(keys=keys) as router, open_dealer(router.address, key=a_client_key(keys)) as dealer:
        host, _, port = router.address.removeprefix("tcp://").rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        assert await is_heard(router, dealer)
        writer.close()


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("ipc:///run/socket", True),
        ("tcp://127.0.0.1:5", True),
        ("tcp://127.9.9.9:5", True),
        ("tcp://localhost:5", True),
        ("tcp://[::1]:5", True),
        ("tcp://0.0.0.0:5", False),
        ("tcp://*:5", False),
        ("tcp://10.0.0.1:5", False),
        ("tcp://example:5", False),
    ],
)
def test_only_loopback_and_paths_are_local(address: str, local: bool):
    assert is_local(address) is local


@pytest.mark.parametrize("open_socket", [open_dealer, open_router])
async def test_an_address_that_others_can_reach_needs_keys(open_socket: object):
    with pytest.raises(WireError, match=r"can be reached from other machines, so it needs keys"):
        async with open_socket("tcp://0.0.0.0:0", max_frame_bytes=1):  # type: ignore[operator]
            pass


async def test_a_port_that_is_taken_is_named():
    async with a_router() as router:
        with pytest.raises(WireError, match=f"cannot listen on {router.address}: Address already in use"):
            async with open_router(router.address, max_frame_bytes=1):
                pass


async def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path):
    with pytest.raises(WireError, match="more than 107 bytes"):
        async with open_router(f"ipc://{tmp_path}/{'x' * 100}", max_frame_bytes=1):
            pass


def test_no_descriptor_stays_open():
    async def once() -> None:
        async with a_router() as router, open_dealer(router.address) as dealer:
            assert await is_heard(router, dealer)

    asyncio.run(once())
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(once())
    assert len(os.listdir("/proc/self/fd")) == before
