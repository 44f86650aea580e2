import asyncio
import logging
import os
import socket as stdlib_socket
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from common.keys import ClientKey, ServerKeys, ensure_server_keys
from common.wire import WireError, curve_keypair, open_dealer, watch
from common.wire.doorkeeper import Doorkeeper
from common.wire.refusals import Refusals
from tests.builders_wire import SHORT_S, TIMEOUT_S, a_client_key, a_router, is_heard


@pytest.fixture
def keys(tmp_path: Path) -> ServerKeys:
    return ensure_server_keys(tmp_path / "keys", curve_keypair)


def a_strangers_key(keys: ServerKeys) -> ClientKey:
    public, secret = curve_keypair()
    return ClientKey(public=public, secret=secret, server_public=keys.public)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


async def test_a_key_on_the_allow_list_is_let_in_and_is_the_peers_identity(keys: ServerKeys):
    key = a_client_key(keys)
    async with a_router(keys=keys) as router, open_dealer(router.address, key=key) as dealer:
        dealer.try_send([b"hello", b""])
        async with asyncio.timeout(TIMEOUT_S):
            [incoming] = await router.receive()
        assert incoming.peer.key == key.public.hex()


async def test_a_strangers_key_is_refused(keys: ServerKeys):
    async with a_router(keys=keys) as router, open_dealer(router.address, key=a_strangers_key(keys)) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_peer_without_a_key_is_refused(keys: ServerKeys):
    async with a_router(keys=keys) as router, open_dealer(router.address) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_server_that_is_not_the_expected_one_is_not_talked_to(keys: ServerKeys):
    key = a_client_key(keys)
    other = ClientKey(public=key.public, secret=key.secret, server_public=curve_keypair()[0])
    async with a_router(keys=keys) as router, open_dealer(router.address, key=other) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_dealer_with_a_key_does_not_talk_to_a_router_without_one(keys: ServerKeys):
    async with a_router() as router, open_dealer(router.address, key=a_client_key(keys)) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_revoked_key_is_refused_at_its_next_connection_and_a_new_one_is_let_in(keys: ServerKeys):
    key = a_client_key(keys)
    async with a_router(keys=keys) as router:
        async with open_dealer(router.address, key=key) as dealer:
            assert await is_heard(router, dealer)
        (keys.directory / "allowed" / "node.pub").unlink()
        async with open_dealer(router.address, key=key) as dealer:
            assert not await is_heard(router, dealer, SHORT_S)
        async with open_dealer(router.address, key=a_client_key(keys, "newcomer")) as dealer:
            assert await is_heard(router, dealer)


async def test_without_a_doorkeeper_nobody_is_let_in(keys: ServerKeys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watch, "_open_zap_socket", lambda context: context.socket(zmq.REP))
    async with a_router(keys=keys) as router, open_dealer(router.address, key=a_client_key(keys)) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)


async def test_a_refused_peer_is_let_in_without_a_restart_once_its_key_is_allowed(keys: ServerKeys):
    key = a_client_key(keys)
    (keys.directory / "allowed" / "node.pub").rename(keys.directory / "kept")
    async with a_router(keys=keys) as router, open_dealer(router.address, key=key) as dealer:
        assert not await is_heard(router, dealer, SHORT_S)
        (keys.directory / "kept").rename(keys.directory / "allowed" / "node.pub")
        assert await is_heard(router, dealer)


async def test_the_doorkeeper_ends_with_its_socket(keys: ServerKeys):
    async with a_router(keys=keys):
        [doorkeeper] = [thread for thread in threading.enumerate() if thread.name == "doorkeeper"]
    doorkeeper.join(TIMEOUT_S)
    assert not doorkeeper.is_alive()


async def test_who_takes_anothers_routing_id_is_still_known_by_its_own_key(keys: ServerKeys):
    honest, thief = a_client_key(keys, "honest"), a_client_key(keys, "thief")
    async with a_router(keys=keys) as router, asyncio.timeout(TIMEOUT_S):
        async with open_dealer(router.address, key=honest) as dealer:
            dealer.try_send([b"hello", b""])
            [heard] = await router.receive()
        with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.CURVE_PUBLICKEY, thief.public)
            socket.set(zmq.CURVE_SECRETKEY, thief.secret)
            socket.set(zmq.CURVE_SERVERKEY, keys.public)
            socket.set(zmq.ROUTING_ID, b"x" + heard.peer.routing_id)
            socket.connect(router.address)
            socket.send_multipart([b"give me the answers", b""])
            [stolen] = await router.receive()
        assert stolen.peer.routing_id == b"x" + heard.peer.routing_id
        assert stolen.peer.key == thief.public.hex()


@pytest.mark.parametrize("side", ["router", "dealer"])
async def test_a_frame_may_be_as_large_as_the_limit_when_it_is_encrypted_too(keys: ServerKeys, side: str):
    key = a_client_key(keys)
    async with (
        a_router(keys=keys, max_frame_bytes=5000) as router,
        open_dealer(router.address, key=key, max_frame_bytes=5000) as dealer,
        asyncio.timeout(TIMEOUT_S),
    ):
        dealer.try_send([b"header", bytes(5000 if side == "router" else 0)])
        [incoming] = await router.receive()
        router.send(incoming.peer, [b"header", bytes(5000 if side == "dealer" else 0)])
        await dealer.receive()


async def test_keys_that_do_not_belong_together_are_refused_before_anything_is_tried(keys: ServerKeys):
    key = a_client_key(keys)
    mixed = ClientKey(public=curve_keypair()[0], secret=key.secret, server_public=key.server_public)
    with pytest.raises(WireError, match=r"the public and the secret key of <ClientKey .*> do not belong together"):
        async with open_dealer("tcp://127.0.0.1:5", key=mixed):
            pass


def test_refusals_are_logged_with_the_key_but_not_at_the_pace_of_the_attempts(
    keys: ServerKeys, caplog: pytest.LogCaptureFixture
):
    doorkeeper = Doorkeeper(keys.allowed, Refusals())
    public = curve_keypair()[0]
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            answer = doorkeeper.answer([b"1.0", b"1", b"domain", b"10.0.0.9", b"", b"CURVE", public])
            assert answer[2] == b"300"
    assert [record.message for record in caplog.records] == [
        "refused a connection whose key is not on the allow-list: 1 times, the last time "
        f"from 10.0.0.9 with key {public.hex()[:8]}; <AllowList {keys.directory}/allowed, 0 keys>"
    ]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\xff" * 4096,
        b"\xff\0\0\0\0\0\0\0\1\x7f" + bytes(54),
        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0NULL".ljust(64, b"\0") + b"\4\x29\5READY",
        b"\xff\0\0\0\0\0\0\0\1\x7f\3\0CURVE".ljust(64, b"\0") + b"\6" + b"\xff" * 8,  # a command of 2**64 - 1 bytes
        b"\1\0" + b"\x7f",
    ],
)
async def test_garbage_on_the_port_does_not_disturb_a_legitimate_peer(keys: ServerKeys, garbage: bytes):
    async with a_router(keys=keys) as router, open_dealer(router.address, key=a_client_key(keys)) as dealer:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(router.address))
        writer.write(garbage)
        await writer.drain()
        assert await is_heard(router, dealer)
        assert await is_heard(router, dealer)
        writer.close()


async def test_many_connections_that_say_nothing_or_noise_do_not_keep_a_legitimate_peer_out(keys: ServerKeys):
    async with a_router(keys=keys) as router:
        with ExitStack() as stack:
            for number in range(100):
                silent = stack.enter_context(stdlib_socket.create_connection(("127.0.0.1", port_of(router.address))))
                silent.sendall(os.urandom(number))
            async with open_dealer(router.address, key=a_client_key(keys)) as dealer:
                assert await is_heard(router, dealer)
