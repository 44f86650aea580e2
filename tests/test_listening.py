import asyncio
import gc
import socket
from contextlib import suppress

import pytest

from tests.listening import stop_listening
from tests.rollout_server.http_twin import HttpTwin, Request, reply
from tests.rollout_server.openenv_twin import OpenEnvTwin

REQUEST = (
    b"GET /ws HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n"
)


async def end_of(client: socket.socket) -> None:
    client.setblocking(False)
    with suppress(ConnectionResetError):
        while await asyncio.get_running_loop().sock_recv(client, 1 << 16):
            pass


async def answer(request: Request) -> bytes:
    return reply("sound")


@pytest.mark.parametrize("num_turns", range(6))
@pytest.mark.parametrize("kind", [OpenEnvTwin, HttpTwin])
async def test_a_server_that_stops_while_it_accepts_a_connection_leaves_none_open(
    kind: type[OpenEnvTwin] | type[HttpTwin], num_turns: int
):
    twin = OpenEnvTwin() if kind is OpenEnvTwin else HttpTwin(answer)
    await twin.start(0)
    with socket.create_connection(("127.0.0.1", twin.port)) as client:  # the kernel answers; the loop has not yet
        client.sendall(REQUEST)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await twin.stop()
            await end_of(client)
    gc.collect()  # what was left open would be said, and fail


async def test_nobody_is_accepted_any_more():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()
    await stop_listening(server)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(*address)
