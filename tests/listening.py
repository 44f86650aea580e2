"""An end for asyncio's servers that leaves nothing half open."""

import asyncio

from websockets.asyncio.server import Server


async def stop_listening(server: asyncio.Server | Server) -> None:
    """Close it, with each connection either not accepted or known to the handler.

    A server that is closed in the turn in which it accepts a connection loses it: nobody serves it, and nobody closes
    it, until the garbage collector does.
    """
    loop = asyncio.get_running_loop()
    for listener in server.sockets:
        loop.remove_reader(listener.fileno())
    for _ in range(3):  # it gets its transport, is handed to the protocol, and the handler begins
        await asyncio.sleep(0)
    server.close()
