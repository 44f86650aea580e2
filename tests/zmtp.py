"""ZMTP by hand: what a peer can send that does not use ZeroMQ, or means harm (ZeroMQ RFC 13, 15, 23, 37)."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MORE, LONG, COMMAND = 1, 2, 4


def greeting(mechanism: str = "NULL", version: tuple[int, int] = (3, 1)) -> bytes:
    """64 bytes."""
    signature = b"\xff" + bytes(8) + b"\x7f"
    return signature + bytes(version) + mechanism.encode().ljust(20, b"\0") + bytes(32)


def frame(body: bytes, *, more: bool = False, command: bool = False) -> bytes:
    return frame_header(len(body), more=more, command=command) + body


def frame_header(length: int, *, more: bool = False, command: bool = False) -> bytes:
    """Announces a frame of `length` bytes."""
    flags = (MORE if more else 0) | (COMMAND if command else 0)
    if length < 256:
        return bytes([flags, length])
    return bytes([flags | LONG]) + length.to_bytes(8, "big")


def ready(routing_id: bytes = b"") -> bytes:
    """The command that ends a handshake without keys."""
    properties = {b"Socket-Type": b"DEALER", b"Identity": routing_id}
    body = b"\5READY"
    for name, value in properties.items():
        body += bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
    return frame(body, command=True)


def message(*bodies: bytes) -> bytes:
    return b"".join(frame(body, more=index + 1 < len(bodies)) for index, body in enumerate(bodies))


OLD_GREETINGS = {
    "ZMTP 1": b"\1\0",  # an anonymous peer: a frame without a body
    "ZMTP 2": b"\xff" + bytes(7) + b"\1\x7f" + b"\1\5" + b"\0\0",  # revision 1, DEALER, an anonymous peer
}


@asynccontextmanager
async def a_raw_connection(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A TCP connection to a socket of this machine that says nothing by itself."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


@asynccontextmanager
async def a_raw_peer(
    port: int, *, routing_id: bytes = b""
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection without keys, its handshake done."""
    async with a_raw_connection(port) as (reader, writer):
        writer.write(greeting())
        await reader.readexactly(64)
        writer.write(ready(routing_id))
        header = await reader.readexactly(2)
        await reader.readexactly(header[1])  # their READY: earlier messages would break the handshake
        yield reader, writer
