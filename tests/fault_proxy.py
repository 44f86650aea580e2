"""FaultProxy: a TCP proxy that does to connections what bad networks do. Its faults can be changed at any moment.

async with a_fault_proxy(router.address) as proxy, open_dealer(proxy.address) as dealer:
    proxy.up = Faults(flip_every=10_000)   # on the way to the router, from now on
    proxy.cut()                            # every connection, at once
"""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from tests.listening import stop_listening

PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What happens to bytes on their way in one direction; by default nothing."""

    bytes_per_s: float | None = None  # a trickle, or a cap
    delay_s: float = 0.0  # before each piece
    flip_every: int | None = None  # bytes between two flipped bits, on average
    cut_at: int | None = None  # the connection is ended when exactly so many of its bytes were passed on
    is_stuck: bool = False  # half-open: nothing is read and nothing passed on, and nobody is told
    is_lost: bool = False  # a black hole: everything is read, nothing passed on


NO_FAULTS = Faults()


class FaultProxy:
    """Between those who connect to `address` and the one address behind it."""

    def __init__(self, target: tuple[str, int], seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._links: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._faults = {"up": NO_FAULTS, "down": NO_FAULTS}
        self.accepts = True  # False: a connection is ended as soon as it is made
        self.passed = {"up": 0, "down": 0}  # bytes, over all connections
        self.flipped = 0  # bits
        self.num_ended = 0  # connections
        self.address = ""

    def __repr__(self) -> str:
        return f"<FaultProxy {self.address}, {len(self._links)} connections, passed {self.passed}>"

    @property
    def up(self) -> Faults:
        """From those who connect."""
        return self._faults["up"]

    @up.setter
    def up(self, faults: Faults) -> None:
        self._change("up", faults)

    @property
    def down(self) -> Faults:
        """To those who connect."""
        return self._faults["down"]

    @down.setter
    def down(self, faults: Faults) -> None:
        self._change("down", faults)

    def both(self, faults: Faults) -> None:
        self.up = self.down = faults

    def heal(self) -> None:
        """No more faults; what was cut or lost stays so."""
        self.both(NO_FAULTS)
        self.accepts = True

    def cut(self) -> None:
        """End every connection, as if a cable was pulled and the router on the way said so."""
        for link in self._links:
            link.cancel()

    async def close(self) -> None:
        self.cut()
        await asyncio.gather(*self._links, return_exceptions=True)

    def _change(self, direction: str, faults: Faults) -> None:
        self._faults[direction] = faults
        self._changed.set()
        self._changed = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until one of its ends or a fault ends it."""
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        writers = [writer]
        try:
            if self.accepts:
                far_reader, far_writer = await asyncio.open_connection(*self._target)
                writers.append(far_writer)
                await self._join(
                    asyncio.ensure_future(self._pass_on("up", reader, far_writer)),
                    asyncio.ensure_future(self._pass_on("down", far_reader, writer)),
                )
        except (OSError, asyncio.CancelledError):
            pass  # the far end is not there, or the proxy cuts: that is all there is to do
        else:
            for one in writers:
                one.close()
        finally:
            self._links.discard(link)
            self.num_ended += 1
            for one in writers:
                _reset(one)

    async def _join(self, *directions: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for direction in directions:
                direction.cancel()
                with suppress(asyncio.CancelledError, OSError):
                    await direction

    async def _pass_on(self, direction: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Returns when the connection is to end."""
        passed = 0
        while True:
            await self._unstuck(direction)
            data = await self._read(reader, direction)
            if data is None:
                continue
            faults = await self._unstuck(direction)
            if faults.is_lost and data:
                continue
            await asyncio.sleep(faults.delay_s)
            keep = len(data) if faults.cut_at is None else max(0, min(len(data), faults.cut_at - passed))
            await self._write(direction, self._flip(data[:keep], faults.flip_every), writer, faults.bytes_per_s)
            passed += keep
            if not data or keep < len(data) or passed == faults.cut_at:
                return

    async def _unstuck(self, direction: str) -> Faults:
        while (faults := self._faults[direction]).is_stuck:
            await self._changed.wait()
        return faults

    async def _read(self, reader: asyncio.StreamReader, direction: str) -> bytes | None:
        """None when the faults were changed meanwhile."""
        bytes_per_s = self._faults[direction].bytes_per_s
        most = PIECE_BYTES if bytes_per_s is None else max(1, min(PIECE_BYTES, int(bytes_per_s / 20)))
        reading = asyncio.ensure_future(reader.read(most))
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait((reading, changing), return_when=asyncio.FIRST_COMPLETED)
            return reading.result() if reading.done() else None
        finally:
            reading.cancel()
            changing.cancel()

    def _flip(self, data: bytes, flip_every: int | None) -> bytes:
        if flip_every is None:
            return data
        damaged = bytearray(data)
        position = int(self._random.expovariate(1 / flip_every))
        while position < len(damaged):
            damaged[position] ^= 1 << self._random.randrange(8)
            self.flipped += 1
            position += 1 + int(self._random.expovariate(1 / flip_every))
        return bytes(damaged)

    async def _write(
        self, direction: str, data: bytes, writer: asyncio.StreamWriter, bytes_per_s: float | None
    ) -> None:
        writer.write(data)
        self.passed[direction] += len(data)
        await writer.drain()
        if bytes_per_s is not None:
            await asyncio.sleep(len(data) / bytes_per_s)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends with a reset what is not closed yet."""
    if writer.transport.is_closing():
        return
    with suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def a_fault_proxy(target: str, *, seed: int = 0) -> AsyncIterator[FaultProxy]:
    """target: tcp://HOST:PORT of whoever is behind the proxy; nobody needs to be there yet."""
    host, _, port = target.removeprefix("tcp://").rpartition(":")
    proxy = FaultProxy((host, int(port)), seed)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        await stop_listening(server)
        await proxy.close()
        await server.wait_closed()
