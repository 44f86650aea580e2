import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.fault_proxy import NO_FAULTS, FaultProxy, Faults, a_fault_proxy

TIMEOUT_S = 10.0
SHORT_S = 0.2

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def an_echoing_proxy(seed: int = 0) -> AsyncIterator[FaultProxy]:
    """In front of a server that sends back what it is sent."""

    ends: set[asyncio.Task[None] | None] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends.add(asyncio.current_task())
        with suppress(ConnectionResetError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with asyncio.timeout(TIMEOUT_S), a_fault_proxy(f"tcp://{host}:{port}", seed=seed) as proxy:
        yield proxy
    server.close()
    await server.wait_closed()
    await asyncio.gather(*filter(None, ends))


@asynccontextmanager
async def a_connection(proxy: FaultProxy) -> AsyncIterator[Streams]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.address.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def echoed(streams: Streams, data: bytes) -> bytes:
    streams[1].write(data)
    return await streams[0].readexactly(len(data))


async def arrives_within(streams: Streams, seconds: float) -> bytes:
    """What arrives until the connection ends or the time is up."""
    arrived = b""
    try:
        async with asyncio.timeout(seconds):
            while data := await streams[0].read(1 << 16):
                arrived += data
    except (TimeoutError, ConnectionResetError):
        pass
    return arrived


async def test_without_faults_everything_arrives_as_it_was_sent():
    data = bytes(range(256)) * 1000
    async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
        assert await echoed(streams, data) == data
        assert proxy.passed == {"up": len(data), "down": len(data)}
        assert repr(proxy) == f"<FaultProxy {proxy.address}, 1 connections, passed {proxy.passed}>"


async def test_the_end_of_one_side_is_the_end_of_the_other():
    async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
        assert await echoed(streams, b"last words") == b"last words"
        streams[1].write_eof()
        assert await streams[0].read() == b""


async def test_a_cut_ends_every_connection_and_new_ones_can_be_made():
    async with an_echoing_proxy() as proxy, a_connection(proxy) as first, a_connection(proxy) as second:
        for streams in (first, second):
            await echoed(streams, b"x")
        proxy.cut()
        for streams in (first, second):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await echoed(streams, b"y")
        async with a_connection(proxy) as third:
            assert await echoed(third, b"z") == b"z"


async def test_a_connection_is_ended_when_exactly_so_many_bytes_were_passed_on():
    for count in (0, 1, 70_000):
        async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
            proxy.down = Faults(cut_at=count)
            streams[1].write(bytes(100_000))
            assert len(await arrives_within(streams, TIMEOUT_S)) == count


async def test_a_trickle_lets_so_many_bytes_a_second_through():
    async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
        proxy.up = Faults(bytes_per_s=1000.0)
        started = time.monotonic()
        await echoed(streams, bytes(500))
        assert 0.4 < time.monotonic() - started < 1.5


async def test_a_delay_is_added_to_each_piece():
    async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
        proxy.both(Faults(delay_s=0.1))
        started = time.monotonic()
        await echoed(streams, b"x")
        assert 0.2 <= time.monotonic() - started < 1.0


async def test_flipped_bits_are_as_many_as_asked_for_and_the_same_for_the_same_seed():
    async def damaged(seed: int) -> bytes:
        async with an_echoing_proxy(seed) as proxy, a_connection(proxy) as streams:
            proxy.up = Faults(flip_every=100)
            return await echoed(streams, bytes(50_000))

    first, again, other = await damaged(1), await damaged(1), await damaged(2)
    assert first == again != other
    assert 400 < sum(byte.bit_count() for byte in first) < 600


async def test_half_open_means_that_nothing_is_taken_and_nothing_said_until_it_heals():
    async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
        await echoed(streams, b"x")
        proxy.up = Faults(is_stuck=True)
        streams[1].write(b"y")
        assert await arrives_within(streams, SHORT_S) == b""
        assert not streams[0].at_eof()
        proxy.up = NO_FAULTS
        assert await streams[0].readexactly(1) == b"y"


async def test_a_black_hole_takes_everything_and_gives_nothing_back():
    async with an_echoing_proxy() as proxy, a_connection(proxy) as streams:
        proxy.up = Faults(is_lost=True)
        streams[1].write(bytes(1 << 20))
        await streams[1].drain()
        assert await arrives_within(streams, SHORT_S) == b""
        proxy.up = NO_FAULTS
        assert await echoed(streams, b"only this") == b"only this"


async def test_a_proxy_that_does_not_accept_ends_new_connections_at_once():
    async with an_echoing_proxy() as proxy:
        proxy.accepts = False
        async with a_connection(proxy) as streams:
            assert await arrives_within(streams, TIMEOUT_S) == b""
        proxy.heal()
        async with a_connection(proxy) as streams:
            assert await echoed(streams, b"x") == b"x"


async def test_when_nobody_is_behind_it_a_connection_ends():
    async with asyncio.timeout(TIMEOUT_S), a_fault_proxy("tcp://127.0.0.1:1") as proxy, a_connection(proxy) as streams:
        assert await arrives_within(streams, TIMEOUT_S) == b""
