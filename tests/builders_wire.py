"""Builders for sockets that really talk to each other over loopback."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.keys import ClientKey, ServerKeys, ensure_client_key, load_client_key
from common.wire import Dealer, Router, curve_keypair, open_dealer, open_router

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


@asynccontextmanager
async def an_answered_peer(
    address: str, key: ClientKey | None = None, *, patience_s: float = 1.0
) -> AsyncIterator[None]:
    """A peer that asks an echoing router all the time; raises AssertionError if it once waits longer than that."""
    numbers = itertools.count()

    async def ask(dealer: Dealer, within_s: float) -> None:
        question = b"question %d" % next(numbers)
        started_s = time.monotonic()
        await dealer.send([question, b"payload" * 100])
        async with asyncio.timeout(TIMEOUT_S):
            assert (await dealer.receive())[0] == question
        assert time.monotonic() - started_s < within_s

    async def keep_asking(dealer: Dealer) -> None:
        while True:
            await ask(dealer, patience_s)
            await asyncio.sleep(0.01)

    async with open_dealer(address, key=key) as dealer, asyncio.TaskGroup() as tasks:
        await ask(dealer, TIMEOUT_S)
        asking = tasks.create_task(keep_asking(dealer))
        yield
        before = next(numbers)
        async with asyncio.timeout(TIMEOUT_S):
            while next(numbers) < before + 5:  # it is answered still
                await asyncio.sleep(0.02)
        asking.cancel()
