"""Sockets: the one file that names ZeroMQ. Routers bind, dealers connect, frames travel, nothing is interpreted.

ZeroMQ's file descriptor is edge-triggered, and its asyncio layer costs about 20 us a message. So each socket here is
drained without blocking whenever the descriptor fires, whenever something was sent, and once a second anyway.

What bounds memory is credit (leases) in the layer above, not high-water marks; what is not taken here is reported to
the sender, which keeps it and sends it again.
"""

import asyncio
import ipaddress
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import zmq
import zmq.auth.thread
from zmq.utils import z85

from common.codec import Frame, Frames
from common.keys import AllowList, ClientKey, KeyFileError, KeyPair, ServerKeys
from common.lifecycle import UserError

logger = logging.getLogger(__name__)

DRAIN_LIMIT = 64  # messages per turn, so that one busy socket does not starve the event loop
POLL_ANYWAY_S = 1.0
SEND_RETRY_S = 0.02
ZERO_COPY_BYTES = 1 << 16  # below this, copying is cheaper than sharing
MAX_IPC_PATH_BYTES = 107

HANDSHAKE_MS = 3_000
HEARTBEAT_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 8_000
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
LINGER_MS = 500
ROUTER_QUEUE_MESSAGES = 1_000  # per peer
DEALER_QUEUE_MESSAGES = 256


class WireError(UserError):
    """An address that cannot be used, and what to do about it."""


class SendResult(Enum):
    SENT = "sent"
    FULL = "full"  # the peer takes nothing more at the moment
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of one connection. Its identity is its key; the routing id only says where to send."""

    routing_id: bytes
    key: str  # public key in hexadecimal, proven; empty on a local socket without keys


@dataclass(frozen=True, slots=True)
class Incoming:
    peer: Peer
    frames: Frames


def curve_keypair() -> KeyPair:
    """A fresh (public, secret) pair, 32 bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def is_local(address: str) -> bool:
    """Whether only processes of this machine can be at the other end."""
    if address.startswith("ipc://"):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Socket:
    """A ZeroMQ socket in an event loop."""

    def __init__(self, socket: "zmq.Socket[bytes]", address: str) -> None:
        self._socket = socket
        self._wake = asyncio.Event()
        self.address = address
        self.malformed = 0  # messages dropped for their number of frames

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}>"

    def attach(self) -> None:
        asyncio.get_running_loop().add_reader(self._socket.FD, self._wake.set)

    def detach(self) -> None:
        asyncio.get_running_loop().remove_reader(self._socket.FD)

    async def _wait_for_change(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()

    def _receive_now(self) -> list[zmq.Frame] | None:
        try:
            return self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None

    def _send_now(self, frames: Sequence[Frame]) -> SendResult:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=all(len(f) < ZERO_COPY_BYTES for f in frames))
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return SendResult.GONE
            raise
        finally:
            self._wake.set()  # sending may have swallowed the edge that said "readable"
        return SendResult.SENT


def _body(frames: Sequence[zmq.Frame]) -> Frames:
    return [frame.buffer if len(frame) >= ZERO_COPY_BYTES else frame.bytes for frame in frames]


class Router(_Socket):
    """Binds, and talks to every peer that connects."""

    async def receive(self) -> list[Incoming]:
        """What has arrived, at least one message, at most DRAIN_LIMIT."""
        await asyncio.sleep(0)
        while True:
            self._wake.clear()
            if drained := self._drain():
                return drained
            await self._wait_for_change(POLL_ANYWAY_S)

    def _drain(self) -> list[Incoming]:
        drained: list[Incoming] = []
        while len(drained) < DRAIN_LIMIT and (frames := self._receive_now()) is not None:
            if len(frames) != 3:
                self.malformed += 1
                continue
            drained.append(Incoming(Peer(frames[0].bytes, _key_of(frames[1])), _body(frames[1:])))
        return drained

    def send(self, peer: Peer, frames: Frames) -> SendResult:
        """Hands the message to ZeroMQ or says why not; never waits, never queues."""
        return self._send_now([peer.routing_id, *frames])


def _key_of(frame: zmq.Frame) -> str:
    try:
        user_id = frame.get("User-Id")
    except zmq.ZMQError:
        return ""  # a socket without keys
    return z85.decode(str(user_id).encode()).hex() if user_id else ""


class Dealer(_Socket):
    """Connects to one router; reconnects by itself when the connection breaks."""

    async def receive(self) -> Frames:
        await asyncio.sleep(0)
        while True:
            self._wake.clear()
            while (frames := self._receive_now()) is not None:
                if len(frames) == 2:
                    return _body(frames)
                self.malformed += 1
            await self._wait_for_change(POLL_ANYWAY_S)

    def try_send(self, frames: Frames) -> bool:
        """False when the router takes nothing more at the moment."""
        return self._send_now(frames) is SendResult.SENT

    async def send(self, frames: Frames) -> None:
        """Waits until there is room. There is none while the router is away and the queue to it is full."""
        while not self.try_send(frames):
            await asyncio.sleep(SEND_RETRY_S)


@asynccontextmanager
async def open_router(address: str, *, max_frame_bytes: int, keys: ServerKeys | None = None) -> AsyncIterator[Router]:
    """Binds to `address`; port 0 takes a free one. With keys, only those on their allow-list can connect.

    Raises WireError when it cannot be bound, or is reachable from other machines and has no keys.
    """
    _check_address(address, has_keys=keys is not None, other_end="rollout servers need a key file from keys/")
    with _open_context() as context:
        authenticator = _start_authenticator(context, keys) if keys is not None else None
        try:
            socket = context.socket(zmq.ROUTER)
            _set_options(socket, max_frame_bytes, ROUTER_QUEUE_MESSAGES)
            socket.set(zmq.ROUTER_MANDATORY, 1)
            if keys is not None:
                socket.set(zmq.CURVE_SERVER, 1)
                socket.set(zmq.CURVE_SECRETKEY, keys.secret)
            try:
                socket.bind(address)
            except zmq.ZMQError as error:
                raise WireError(f"cannot listen on {address}: {error.strerror}; choose another address") from error
            endpoint = socket.get(zmq.LAST_ENDPOINT)
            assert isinstance(endpoint, bytes)
            router = Router(socket, endpoint.decode().rstrip("\0"))
            router.attach()
            try:
                yield router
            finally:
                router.detach()
        finally:
            if authenticator is not None:
                authenticator.stop()


@asynccontextmanager
async def open_dealer(
    address: str, *, max_frame_bytes: int = -1, key: ClientKey | None = None
) -> AsyncIterator[Dealer]:
    """Connects to `address`, now or whenever something listens there.

    Raises WireError for an address that is none, or is on another machine when there is no key.
    """
    _check_address(address, has_keys=key is not None, other_end="give the key file the learner wrote, with --key")
    with _open_context() as context:
        socket = context.socket(zmq.DEALER)
        _set_options(socket, max_frame_bytes, DEALER_QUEUE_MESSAGES)
        socket.set(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.set(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        if key is not None:
            socket.set(zmq.CURVE_PUBLICKEY, key.public)
            socket.set(zmq.CURVE_SECRETKEY, key.secret)
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
        context.destroy(linger=LINGER_MS)


def _set_options(socket: "zmq.Socket[bytes]", max_frame_bytes: int, queue_messages: int) -> None:
    socket.set(zmq.MAXMSGSIZE, max_frame_bytes)
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, queue_messages)
    socket.set(zmq.RCVHWM, queue_messages)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.set(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.set(zmq.HEARTBEAT_TTL, HEARTBEAT_TIMEOUT_MS)


def _check_address(address: str, *, has_keys: bool, other_end: str) -> None:
    if not address.startswith(("tcp://", "ipc://")):
        raise WireError(f"{address!r} is not an address; it must be like tcp://HOST:PORT")
    path = address.removeprefix("ipc://")
    if address.startswith("ipc://") and len(path.encode()) > MAX_IPC_PATH_BYTES:
        raise WireError(f"the path {path} has more than {MAX_IPC_PATH_BYTES} bytes, too many for a local socket")
    if not has_keys and not is_local(address):
        raise WireError(f"{address} can be reached from other machines, so it needs keys: {other_end}")


class _AllowedKeys:
    """pyzmq's credentials provider over our allow-list."""

    def __init__(self, directory: Path) -> None:
        self._allowed = AllowList(directory)

    def callback(self, domain: str, key: bytes) -> bool:
        public = z85.decode(key)
        try:
            name = self._allowed.name_of(public)
        except KeyFileError as error:
            logger.warning("nobody is let in until this is repaired: %s", error)
            return False
        if name is None:
            logger.warning("refused a connection: key %s is not on the allow-list", public.hex()[:8])
        return name is not None


def _start_authenticator(
    context: "zmq.Context[zmq.Socket[bytes]]", keys: ServerKeys
) -> zmq.auth.thread.ThreadAuthenticator:
    authenticator = zmq.auth.thread.ThreadAuthenticator(context, log=logging.getLogger("zmq.auth"))
    logging.getLogger("zmq.auth").setLevel(logging.ERROR)
    authenticator.start()
    authenticator.configure_curve_callback(domain="*", credentials_provider=_AllowedKeys(keys.directory))
    return authenticator
