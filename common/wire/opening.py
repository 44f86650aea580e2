"""Opening sockets, and closing them again."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager

import zmq

from common.keys import ClientKey, RelayKeys, ServerKeys
from common.memory import MemoryBound
from common.wire import options
from common.wire.addresses import WireError, check_address, check_path_is_free, is_local
from common.wire.lifeline import Lifeline
from common.wire.sockets import Dealer, Router
from common.wire.watch import Watch, watching

REMOTE_FRAME_BYTES = 256 << 20


@asynccontextmanager
async def open_router(
    address: str,
    *,
    max_frame_bytes: int,
    keys: ServerKeys | RelayKeys | None = None,
    send_queue_messages: int = options.SEND_QUEUE_MESSAGES,
    max_growth_bytes: int | None = None,
) -> AsyncIterator[Router]:
    """Binds to `address`; port 0 takes a free one. With keys, only those on their allow-list can connect.

    send_queue_messages: that ZeroMQ holds for each connection before Router.send says FULL.
    max_growth_bytes: how much the memory of this process may grow from now on. Beyond it, those connections are cut
    that have most data on their way to us. None: without bound.
    Raises WireError when it cannot be bound, or is reachable from other machines and has no keys.
    """
    check_address(address, has_keys=keys is not None, where_keys_are="rollout servers need a key file from keys/")
    check_path_is_free(address)
    encrypted = keys is not None
    watch = Watch(
        limits=options.connection_limits(max_frame_bytes, encrypted=encrypted),
        allowed=keys.allowed if keys is not None else None,
        memory=MemoryBound(max_growth_bytes) if max_growth_bytes is not None else None,
    )
    options.hide_routing_ids()
    with open_context() as context, context.socket(zmq.ROUTER) as socket:
        options.set_options(socket, address, max_frame_bytes, encrypted=encrypted)
        socket.set(zmq.SNDHWM, send_queue_messages)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            options.set_key_pair(socket, keys)
            options.ask_for_keys(socket)
        with watching(context, socket, watch):
            bound_address = _bind(socket, address)
        router = Router(socket, bound_address, watch)
        router.attach()
        try:
            yield router
        finally:
            router.detach()


def _bind(socket: "zmq.Socket[bytes]", address: str) -> str:
    """Returns the address as bound."""
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise WireError(f"cannot listen on {address}: {error.strerror}; choose another address") from error
    endpoint = socket.get(zmq.LAST_ENDPOINT)
    assert isinstance(endpoint, bytes)
    return endpoint.decode().rstrip("\0")


@asynccontextmanager
async def open_dealer(
    address: str,
    *,
    max_frame_bytes: int | None = None,
    key: ClientKey | None = None,
    linger_ms: int = options.LINGER_MS,
) -> AsyncIterator[Dealer]:
    """Connects to `address`, now or whenever something listens there.

    max_frame_bytes: if None, a router of this machine is trusted with any size, another with REMOTE_FRAME_BYTES.
    linger_ms: how long closing may wait, and hold up the event loop, for what is not on its way yet.
    Raises WireError for an address that is none, or is on another machine when there is no key.
    """
    check_address(address, has_keys=key is not None, where_keys_are="give the key file the learner wrote, with --key")
    if max_frame_bytes is None:
        max_frame_bytes = -1 if is_local(address) else REMOTE_FRAME_BYTES
    with (
        open_context() as context,
        context.socket(zmq.DEALER) as socket,
        closing(Lifeline(context, socket, address)) as lifeline,
    ):
        options.set_options(socket, address, max_frame_bytes, encrypted=key is not None)
        socket.set(zmq.LINGER, linger_ms)
        # Messages may queue before there is a connection (IMMEDIATE stays off): Hello arrives when the router does.
        socket.set(zmq.RECONNECT_IVL, options.RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, options.RECONNECT_MAX_MS)
        if key is not None:
            options.set_key_pair(socket, key)
            options.expect_key(socket, key.server_public)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise WireError(
                f"cannot connect to {address}: {error.strerror}; it must be like tcp://HOST:PORT"
            ) from error
        dealer = Dealer(socket, address, lifeline)
        dealer.attach()
        try:
            yield dealer
        finally:
            dealer.detach()


@contextmanager
def open_context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    """A context per socket: each has an allow-list of its own, and they end independently."""
    options.check_library()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield context
    finally:
        context.term()  # waits for LINGER_MS at most, and ends the watch
