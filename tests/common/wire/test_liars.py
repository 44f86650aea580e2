"""Those who hold a key that is allowed and mean harm, at the socket of a router in a process of its own."""

import asyncio
import socket as stdlib_socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest
import zmq

from common.keys import ClientKey, ServerKeys, ensure_server_keys
from common.wire import Dealer, curve_keypair, open_dealer, options
from tests.builders_wire import TIMEOUT_S, a_client_key, an_answered_peer
from tests.router_process import RouterProcess, a_router_process
from tests.zmtp import a_raw_peer, frame, frame_header, message

MiB = 1 << 20
FIRST_ROUTING_ID = 0x6B8B4567  # libc's rand() when nobody has given it a seed


@pytest.fixture
def keys(tmp_path: Path) -> ServerKeys:
    return ensure_server_keys(tmp_path / "keys", curve_keypair)


@asynccontextmanager
async def a_visited_router(
    keys: ServerKeys | None, *, growth_bytes: int = 32 * MiB, patience_s: float = 1.0, **settings: object
) -> AsyncIterator[RouterProcess]:
    """Inside, an honest peer is served all the time; memory grows by no more than `growth_bytes`."""
    if keys is not None:
        settings["keys"] = str(keys.directory)
    async with a_router_process(**settings) as router:
        honest = a_client_key(keys, "honest") if keys is not None else None
        async with an_answered_peer(router.address, honest, patience_s=patience_s):
            before = router.memory_bytes()
            router.forget_peak()
            yield router
        assert router.memory_bytes("VmHWM") - before < growth_bytes


@contextmanager
def a_dealer_of_its_own(
    address: str, key: ClientKey | None = None, *, routing_id: bytes | None = None
) -> Iterator["zmq.Socket[bytes]"]:
    """ZeroMQ without the rules of common.wire; what it sends waits in its own memory, without bound."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, 0)
        if routing_id is not None:
            socket.set(zmq.ROUTING_ID, routing_id)
        if key is not None:
            socket.set(zmq.CURVE_PUBLICKEY, key.public)
            socket.set(zmq.CURVE_SECRETKEY, key.secret)
            socket.set(zmq.CURVE_SERVERKEY, key.server_public)
        socket.connect(address)
        yield socket


async def answer_to(dealer: "zmq.Socket[bytes]", payload: bytes) -> bytes:
    """The payload that comes back."""
    dealer.send_multipart([b"header", payload])
    async with asyncio.timeout(TIMEOUT_S):
        while not dealer.poll(0):
            await asyncio.sleep(0.02)
    return dealer.recv_multipart()[1]


def hang_up(writer: asyncio.StreamWriter) -> None:
    """With a reset, as a killed process does that had not read everything."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(stdlib_socket.SOL_SOCKET, stdlib_socket.SO_LINGER, linger)
    writer.transport.abort()


# --- too much ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_bytes", [1 * MiB, 10_000])
async def test_a_message_without_end_is_cut_when_its_connection_holds_too_much(keys: ServerKeys, frame_bytes: int):
    key = a_client_key(keys)
    bound = options.HELD_BYTES * 5 // 4 + 32 * MiB  # the router's process looks ten times a second
    async with a_visited_router(keys, growth_bytes=bound) as router:
        with a_dealer_of_its_own(router.address, key) as dealer:
            piece = zmq.Frame(bytes(frame_bytes), copy=False)
            for _ in range(600 * MiB // frame_bytes):
                dealer.send(piece, zmq.SNDMORE, copy=False)
            dealer.send(b"")
            await router.refuses("overlong")
        async with asyncio.timeout(TIMEOUT_S):
            while router.memory_bytes() > router.memory_bytes("VmHWM") - options.HELD_BYTES // 2:
                await asyncio.sleep(0.05)  # it is given back


async def test_many_messages_without_end_share_one_bound(keys: ServerKeys):
    """Five connections under one key, none of which holds too much alone."""
    key = a_client_key(keys)
    async with (
        a_visited_router(keys, growth_bytes=220 * MiB, held_bytes_of_all=100 * MiB) as router,
        AsyncExitStack() as stack,
    ):
        piece = zmq.Frame(bytes(1 * MiB), copy=False)
        for _ in range(5):
            dealer = stack.enter_context(a_dealer_of_its_own(router.address, key))
            for _ in range(60):
                dealer.send(piece, zmq.SNDMORE, copy=False)
            dealer.send(bytes(1))
        await router.refuses("overlong")


async def test_a_message_of_endlessly_many_empty_frames_is_stopped_by_the_bound_on_the_process():
    """In memory they take 32 times what they take on the wire: without keys, which is on this machine only."""
    async with (
        a_visited_router(None, growth_bytes=350 * MiB, max_growth_bytes=200 * MiB, patience_s=4.0) as router,
        a_raw_peer(router.port) as (_, writer),
        asyncio.TaskGroup() as tasks,
    ):
        flooding = tasks.create_task(send_empty_frames(writer))
        await router.refuses("overlong")
        flooding.cancel()


async def send_empty_frames(writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while True:
            writer.write(frame(b"", more=True) * 50_000)
            await writer.drain()


async def test_a_frame_over_the_limit_ends_its_connection_before_it_is_read(keys: ServerKeys):
    async with a_visited_router(None) as router, a_raw_peer(router.port) as (reader, writer):
        writer.write(frame_header(1 << 62) + bytes(4 * MiB))
        with suppress(ConnectionResetError):
            async with asyncio.timeout(TIMEOUT_S):
                while await reader.read(1 << 16):
                    pass


async def test_a_key_that_opens_all_the_connections_there_may_be_keeps_nobody_else_out(keys: ServerKeys):
    key = a_client_key(keys)
    async with (
        a_visited_router(keys, growth_bytes=128 * MiB, max_descriptors=400) as router,
        AsyncExitStack() as stack,
    ):
        for number in range(300):
            dealer = stack.enter_context(a_dealer_of_its_own(router.address, key))
            dealer.send_multipart([b"header", b"%d" % number])
        await router.refuses("crowding", at_least=20)
        async with an_answered_peer(router.address, a_client_key(keys, "newcomer"), patience_s=3.0):
            pass


# --- of the wrong shape --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 3, 100])
@pytest.mark.parametrize("frame_bytes", [0, 10])
async def test_a_message_of_a_wrong_number_of_frames_is_counted(keys: ServerKeys, num_frames: int, frame_bytes: int):
    async with a_visited_router(keys) as router:
        with a_dealer_of_its_own(router.address, a_client_key(keys)) as dealer:
            for _ in range(5):
                dealer.send_multipart([bytes(frame_bytes)] * num_frames)
            await router.refuses("malformed", at_least=5)
            assert await answer_to(dealer, b"") == b""


async def test_messages_in_outdated_protocols_are_counted_and_not_received():
    async with a_visited_router(None) as router, a_raw_peer(router.port):
        _, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(b"\1\0" + b"\7\1header" + b"\10\0payload")  # ZMTP 1: length, flags, body
        await router.refuses("old_protocol")
        hang_up(writer)


# --- against ZeroMQ itself -----------------------------------------------------------------------------------------


async def test_the_routing_ids_of_others_cannot_be_guessed_and_claimed(keys: ServerKeys):
    """Who claims an id that ZeroMQ is about to give to another connection makes it abort the process."""
    async with a_visited_router(keys) as router, AsyncExitStack() as stack:
        key = a_client_key(keys)
        for number in range(20):
            routing_id = b"\0" + struct.pack(">I", FIRST_ROUTING_ID + number)
            dealer = stack.enter_context(a_dealer_of_its_own(router.address, key, routing_id=routing_id))
            assert await answer_to(dealer, b"mine") == b"mine"
        for name in ("first", "second"):
            async with an_answered_peer(router.address, a_client_key(keys, name)):
                pass


async def test_a_peer_that_hangs_up_behind_a_routing_id_that_is_taken_does_not_abort_the_process():
    """Nobody receives its messages: if we sent heartbeats, ZeroMQ would abort at the next one."""
    async with (
        a_visited_router(None) as router,
        a_raw_peer(router.port, routing_id=b"twice") as (_, first),
        a_raw_peer(router.port, routing_id=b"twice") as (_, second),
    ):
        first.write(message(b"header", b"payload"))
        second.write(message(b"header", b"payload") * 5_000)
        await second.drain()
        await asyncio.sleep(0.3)
        hang_up(second)
        await asyncio.sleep(0.5)


async def test_who_claims_the_routing_id_of_another_is_neither_heard_nor_answered_in_its_place(keys: ServerKeys):
    async with a_visited_router(keys) as router, AsyncExitStack() as stack:
        honest, thief = (
            a_dealer_of_its_own(router.address, a_client_key(keys, name), routing_id=b"same")
            for name in ("owner", "thief")
        )
        owner = stack.enter_context(honest)
        assert await answer_to(owner, b"owner") == b"owner"
        late = stack.enter_context(thief)
        late.send_multipart([b"header", b"thief"])
        for _ in range(10):
            assert await answer_to(owner, b"owner") == b"owner"
        assert not late.poll(0)


# --- keys that were allowed ----------------------------------------------------------------------------------------


async def test_the_connections_of_a_revoked_key_end_within_two_seconds_and_those_of_others_stay(keys: ServerKeys):
    async with a_visited_router(keys) as router:
        async with open_dealer(router.address, key=a_client_key(keys)) as dealer:
            await dealer.send([b"header", b"payload"])
            await dealer.receive()
            (keys.directory / "allowed" / "node.pub").unlink()
            async with asyncio.timeout(2.0):
                await router.refuses("revoked")
            await router.refuses("stranger")  # it tries again, and is not let in
            dealer.try_send([b"header", b"payload"])
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(dealer.receive(), 0.5)
        async with an_answered_peer(router.address, a_client_key(keys, "another")):
            pass


async def is_answered(dealer: Dealer) -> bool:
    dealer.try_send([b"header", b"payload"])
    with suppress(TimeoutError):
        async with asyncio.timeout(0.3):
            await dealer.receive()
            return True
    return False


async def test_a_key_that_is_revoked_and_allowed_again_is_served_again_without_a_restart(keys: ServerKeys):
    async with a_visited_router(keys) as router, open_dealer(router.address, key=a_client_key(keys)) as dealer:
        await dealer.send([b"header", b"payload"])
        await dealer.receive()
        (keys.directory / "allowed" / "node.pub").rename(keys.directory / "kept")
        await router.refuses("revoked")
        (keys.directory / "kept").rename(keys.directory / "allowed" / "node.pub")
        async with asyncio.timeout(TIMEOUT_S):
            while not await is_answered(dealer):
                pass
