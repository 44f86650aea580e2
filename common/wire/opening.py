"""Opening sockets: their limits, their keys, and who is let in."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import zmq
from zmq.utils import z85

from common.keys import ClientKey, KeyPair, ServerKeys
from common.wire.addresses import WireError, check_address, check_path_is_free, is_local
from common.wire.doorkeeper import ZAP_DOMAIN, start_doorkeeper
from common.wire.sockets import Dealer, Router

HANDSHAKE_MS = 3_000
HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 8_000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
LINGER_MS = 500
SEND_QUEUE_MESSAGES = 1_000  # per connection
RECEIVE_QUEUE_MESSAGES = 1_000  # per connection, and fewer if they are large:
RECEIVE_QUEUE_BYTES = 64 << 20
REMOTE_FRAME_BYTES = 256 << 20

CURVE_OVERHEAD_BYTES = 33  # that encryption adds to a frame


def curve_keypair() -> KeyPair:
    """A fresh (public, secret) pair, 32 bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


@asynccontextmanager
async def open_router(
    address: str,
    *,
    max_frame_bytes: int,
    keys: ServerKeys | None = None,
    send_queue_messages: int = SEND_QUEUE_MESSAGES,
) -> AsyncIterator[Router]:
    """Binds to `address`; port 0 takes a free one. With keys, only those on their allow-list can connect.

    send_queue_messages: that ZeroMQ holds for each connection before Router.send says FULL.
    Raises WireError when it cannot be bound, or is reachable from other machines and has no keys.
    """
    check_address(address, has_keys=keys is not None, where_keys_are="rollout servers need a key file from keys/")
    check_path_is_free(address)
    with _open_context() as context, context.socket(zmq.ROUTER) as socket:
        _set_options(socket, max_frame_bytes, encrypted=keys is not None)
        socket.set(zmq.SNDHWM, send_queue_messages)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            start_doorkeeper(context, keys.directory)
            _set_key_pair(socket, keys)
            socket.set(zmq.CURVE_SERVER, 1)
            socket.set(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a doorkeeper nobody is let in, instead of everybody
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            raise WireError(f"cannot listen on {address}: {error.strerror}; choose another address") from error
        endpoint = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        router = Router(socket, endpoint.decode().rstrip("\0"), has_keys=keys is not None)
        router.attach()
        try:
            yield router
        finally:
            router.detach()


@asynccontextmanager
async def open_dealer(
    address: str, *, max_frame_bytes: int | None = None, key: ClientKey | None = None
) -> AsyncIterator[Dealer]:
    """Connects to `address`, now or whenever something listens there.

    max_frame_bytes: if None, a router of this machine is trusted with any size, another with REMOTE_FRAME_BYTES.
    Raises WireError for an address that is none, or is on another machine when there is no key.
    """
    check_address(address, has_keys=key is not None, where_keys_are="give the key file the learner wrote, with --key")
    if max_frame_bytes is None:
        max_frame_bytes = -1 if is_local(address) else REMOTE_FRAME_BYTES
    with _open_context() as context, context.socket(zmq.DEALER) as socket:
        _set_options(socket, max_frame_bytes, encrypted=key is not None)
        # Messages may queue before there is a connection (IMMEDIATE stays off): Hello arrives when the router does.
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        if key is not None:
            _set_key_pair(socket, key)
            socket.set(zmq.CURVE_SERVERKEY, key.server_public)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise WireError(
                f"cannot connect to {address}: {error.strerror}; it must be like tcp://HOST:PORT"
            ) from error
        dealer = Dealer(socket, address)
        dealer.attach()
        try:
            yield dealer
        finally:
            dealer.detach()


@contextmanager
def _open_context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    """A context per socket: each has an allow-list of its own, and they end independently."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        yield context
    finally:
        context.term()  # waits for LINGER_MS at most, and ends the doorkeeper


def _set_options(socket: "zmq.Socket[bytes]", max_frame_bytes: int, *, encrypted: bool) -> None:
    queue_messages = RECEIVE_QUEUE_MESSAGES
    if max_frame_bytes >= 0:
        queue_messages = min(queue_messages, max(2, RECEIVE_QUEUE_BYTES // max(max_frame_bytes, 1)))
        socket.set(zmq.MAXMSGSIZE, max_frame_bytes + (CURVE_OVERHEAD_BYTES if encrypted else 0))
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.set(zmq.RCVHWM, queue_messages)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)


def _set_key_pair(socket: "zmq.Socket[bytes]", pair: ServerKeys | ClientKey) -> None:
    if z85.decode(zmq.curve_public(z85.encode(pair.secret))) != pair.public:
        raise WireError(f"the public and the secret key of {pair} do not belong together; make new keys")
    socket.set(zmq.CURVE_PUBLICKEY, pair.public)
    socket.set(zmq.CURVE_SECRETKEY, pair.secret)
