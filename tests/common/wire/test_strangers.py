"""Those who are not let in, at the socket of a router in a process of its own: refused, counted, and out of the way."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from common.keys import ClientKey, ServerKeys, ensure_server_keys
from common.wire import curve_keypair, open_dealer
from tests.builders_wire import a_client_key, an_answered_peer
from tests.router_process import RouterProcess, a_router_process
from tests.zmtp import OLD_GREETINGS, a_raw_connection, frame, frame_header, greeting, ready

TIMEOUT_S = 20.0
HANDSHAKE_S = 3.0
MiB = 1 << 20

TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)
UNWELCOME = {
    "nothing": b"",
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "TLS": TLS_HELLO,
    "random bytes": random.Random(0).randbytes(5000),
    "ones": b"\xff" * 5000,
    **OLD_GREETINGS,
    "no mechanism": greeting("NULL") + ready(),
    "a password": greeting("PLAIN") + frame(b"\5HELLO\5admin\5admin", command=True),
    "an unknown mechanism": greeting("GSSAPI"),
    "a hello that is none": greeting("CURVE") + frame(b"\5HELLO" + bytes(194), command=True),
    "a hello of another size": greeting("CURVE") + frame(b"\5HELLO" + bytes(300), command=True),
    "a command of 4 EiB": greeting("CURVE") + frame_header(1 << 62, command=True),
    "a command of 2**64 - 1 bytes": greeting("CURVE") + b"\6" + b"\xff" * 8,
    "a message before the handshake": greeting("CURVE") + frame(b"hello"),
}


@pytest.fixture
def keys(tmp_path: Path) -> ServerKeys:
    return ensure_server_keys(tmp_path / "keys", curve_keypair)


@asynccontextmanager
async def a_visited_router(keys: ServerKeys, **settings: object) -> AsyncIterator[RouterProcess]:
    """Inside, an honest peer is served all the time; memory does not grow by 32 MiB."""
    async with a_router_process(keys=str(keys.directory), **settings) as router:
        async with an_answered_peer(router.address, a_client_key(keys, "honest")):
            before = router.memory_bytes()
            router.forget_peak()
            yield router
        assert router.memory_bytes("VmHWM") - before < 32 * MiB


async def is_cut(reader: asyncio.StreamReader) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(HANDSHAKE_S + 2.0):
            with suppress(ConnectionResetError):
                while await reader.read(1 << 16):
                    pass
            return True
    return False


async def test_what_does_not_speak_our_protocol_is_cut_and_counted(keys: ServerKeys):
    async with a_visited_router(keys) as router, AsyncExitStack() as stack:
        cut = {}
        for what, sent in UNWELCOME.items():
            reader, writer = await stack.enter_async_context(a_raw_connection(router.port))
            writer.write(sent)
            cut[what] = asyncio.ensure_future(is_cut(reader))
        assert [what for what in cut if not await cut[what]] == []
        await router.refuses("unheard", at_least=len(UNWELCOME))


async def test_a_handshake_in_a_trickle_is_cut_when_its_time_is_up(keys: ServerKeys):
    async with a_visited_router(keys) as router, a_raw_connection(router.port) as (_, writer):
        written = 0
        with suppress(ConnectionResetError, BrokenPipeError):
            for byte in greeting("CURVE"):
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.1)
                written += 1
        assert HANDSHAKE_S / 0.1 - 5 < written < HANDSHAKE_S / 0.1 + 5
        await router.refuses("unheard")


def a_strangers_key(keys: ServerKeys) -> ClientKey:
    public, secret = curve_keypair()
    return ClientKey(public=public, secret=secret, server_public=keys.public)


async def test_a_key_that_is_not_allowed_is_refused_and_counted_once(keys: ServerKeys):
    async with a_visited_router(keys) as router:
        async with open_dealer(router.address, key=a_strangers_key(keys)) as dealer:
            dealer.try_send([b"header", b"payload"])
            await router.refuses("stranger")
        await asyncio.sleep(0.3)
        refusals = await router.refusals()
        assert refusals.get("unheard", 0) == 0


async def test_a_key_that_expects_another_server_is_refused_and_counted(keys: ServerKeys):
    key = a_client_key(keys)
    mistaken = ClientKey(public=key.public, secret=key.secret, server_public=curve_keypair()[0])
    async with a_visited_router(keys) as router, open_dealer(router.address, key=mistaken):
        await router.refuses("unheard")


async def test_oversized_commands_in_the_handshake_of_many_do_not_fill_the_memory(keys: ServerKeys):
    async with a_visited_router(keys) as router, AsyncExitStack() as stack:
        for _ in range(8):
            _, writer = await stack.enter_async_context(a_raw_connection(router.port))
            writer.write(greeting("CURVE") + frame_header(512 * MiB, command=True) + bytes(4 * MiB))
        await router.refuses("unheard", at_least=8)


async def test_connections_that_say_nothing_are_gone_when_their_time_is_up(keys: ServerKeys):
    async with a_visited_router(keys) as router, AsyncExitStack() as stack:
        before = router.num_descriptors()
        for number in range(300):
            _, writer = await stack.enter_async_context(a_raw_connection(router.port))
            writer.write(greeting("CURVE")[: number % 64])
        async with asyncio.timeout(HANDSHAKE_S):
            while router.num_descriptors() < before + 300:
                await asyncio.sleep(0.02)
        await router.refuses("unheard", at_least=300)
        assert router.num_descriptors() < before + 5


async def test_a_crowd_that_says_nothing_takes_no_more_descriptors_than_a_quarter(keys: ServerKeys):
    async with a_visited_router(keys, max_descriptors=800) as router, AsyncExitStack() as stack:
        before = router.num_descriptors()
        for _ in range(700):
            await stack.enter_async_context(a_raw_connection(router.port))
        await router.refuses("crowding", at_least=500)
        assert router.num_descriptors() < before + 300
        async with an_answered_peer(router.address, a_client_key(keys, "newcomer")):
            pass
