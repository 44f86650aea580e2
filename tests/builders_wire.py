"""Builders for sockets that really talk to each other over loopback."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.keys import ClientKey, ServerKeys, ensure_client_key, load_client_key
from common.wire import Dealer, Router, curve_keypair, open_router

TIMEOUT_S = 10.0
SHORT_S = 0.6  # a handshake that is not refused takes some 10 ms
FRAME_BYTES = 1 << 20


@asynccontextmanager
async def a_router(
    address: str = "tcp://127.0.0.1:0", *, max_frame_bytes: int = FRAME_BYTES, keys: ServerKeys | None = None
) -> AsyncIterator[Router]:
    async with open_router(address, max_frame_bytes=max_frame_bytes, keys=keys) as router:
        yield router


def a_client_key(keys: ServerKeys, name: str = "node") -> ClientKey:
    return load_client_key(ensure_client_key(keys, name, curve_keypair))


async def is_heard(router: Router, dealer: Dealer, within_s: float = TIMEOUT_S) -> bool:
    dealer.try_send([b"header", b"payload"])
    try:
        async with asyncio.timeout(within_s):
            return (await router.receive())[0].frames == [b"header", b"payload"]
    except TimeoutError:
        return False
