"""Options of our ZeroMQ sockets: their limits, their keys, their heartbeats."""

import ctypes
import os
import resource

import zmq
from zmq.utils import z85

from common.keys import ClientKey, KeyPair, RelayKeys, ServerKeys
from common.wire.addresses import WireError
from common.wire.connections import CURVE_OVERHEAD_BYTES, Limits, wire_bytes

FRAMES_PER_MESSAGE = 2  # header, payload

HANDSHAKE_MS = 3_000
SILENCE_S = 8.0  # without an answer, before a dealer tries a new connection
KEEPALIVE_S = 8  # without a packet, before the kernel asks whether the other end is still there,
KEEPALIVE_PROBES = 4  # so many times,
KEEPALIVE_INTERVAL_S = 2  # so often
RECONNECT_MS = 100
RECONNECT_MAX_MS = 2_000
LINGER_MS = 500
SEND_QUEUE_MESSAGES = 1_000  # per connection
RECEIVE_QUEUE_MESSAGES = 1_000  # likewise, and fewer if they are large:
RECEIVE_QUEUE_BYTES = 16 << 20

HELD_BYTES = 128 << 20  # of messages on their way to a router, for one connection
HELD_MESSAGES = 3  # and if they are large, at least so many
HELD_BYTES_OF_ALL = 1 << 30
MAX_SILENT_CONNECTIONS = 1_000  # that have not sent a message yet
MAX_CONNECTIONS = 1 << 16
SPARE_DESCRIPTORS = 200  # for everything else the process does

OLDEST_ZEROMQ = (4, 3, 5)

_ZAP_DOMAIN = b"countercurrent"


def curve_keypair() -> KeyPair:
    """A fresh (public, secret) pair, 32 bytes each."""
    public, secret = zmq.curve_keypair()
    return z85.decode(public), z85.decode(secret)


def check_library() -> None:
    """Raises WireError when the installed ZeroMQ can be crashed by strangers (see its NEWS), or has no encryption."""
    if zmq.zmq_version_info() < OLDEST_ZEROMQ or not zmq.has("curve"):
        oldest = ".".join(map(str, OLDEST_ZEROMQ))
        raise WireError(
            f"libzmq {zmq.zmq_version()} {'with' if zmq.has('curve') else 'without'} CURVE cannot be used: version "
            f"{oldest} with CURVE is needed; install pyzmq from its wheel"
        )


def connection_limits(max_frame_bytes: int, *, encrypted: bool) -> Limits:
    """What the connections of a router may hold. Credit keeps honest peers below it, unless we receive nothing."""
    message_bytes = FRAMES_PER_MESSAGE * wire_bytes(max_frame_bytes, encrypted=encrypted)
    descriptors = _raise_descriptor_limit()
    return Limits(
        held_bytes=max(HELD_BYTES, HELD_MESSAGES * message_bytes),
        held_bytes_of_all=HELD_BYTES_OF_ALL,
        connections=min(MAX_CONNECTIONS, descriptors - SPARE_DESCRIPTORS),
        silent_connections=min(MAX_SILENT_CONNECTIONS, descriptors // 4),
    )


def _raise_descriptor_limit() -> int:
    """Every connection takes a descriptor: this process may open as many as the system lets it. Returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def hide_routing_ids() -> None:
    """To be called before a router's socket is made: nobody can guess the routing ids that it will give.

    ZeroMQ counts them up from libc's rand(), which begins with the same number in every process. Whoever claims an id
    before it is given to another connection makes ZeroMQ abort the process (socket_base.cpp, add_out_pipe).
    """
    ctypes.CDLL(None).srand(int.from_bytes(os.urandom(4)))


def set_options(socket: "zmq.Socket[bytes]", address: str, max_frame_bytes: int, *, encrypted: bool) -> None:
    """What all our sockets have in common. max_frame_bytes: of one frame, -1 for any size.

    Nobody sends ZeroMQ's own heartbeats: when a peer hangs up while its receive queue is full, ZeroMQ aborts the
    process at the next one, its own or the peer's (stream_engine_base.cpp, out_event). The queue must have an end, for
    that is what stops a sender; so the kernel asks whether the other end is there, and a dealer that hears no answer
    tries again. A peer whose key is allowed can still abort us, with heartbeats of its own making: the coordinator is
    then started again, and goes on from its journal.
    """
    queue_messages = RECEIVE_QUEUE_MESSAGES
    if max_frame_bytes >= 0:
        queue_messages = min(queue_messages, max(2, RECEIVE_QUEUE_BYTES // max(max_frame_bytes, 1)))
        socket.set(zmq.MAXMSGSIZE, max_frame_bytes + (CURVE_OVERHEAD_BYTES if encrypted else 0))
    socket.set(zmq.LINGER, LINGER_MS)
    socket.set(zmq.SNDHWM, SEND_QUEUE_MESSAGES)
    socket.set(zmq.RCVHWM, queue_messages)
    socket.set(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    if address.startswith("tcp://"):
        socket.set(zmq.TCP_KEEPALIVE, 1)
        socket.set(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S)
        socket.set(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_PROBES)
        socket.set(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)


def ask_for_keys(socket: "zmq.Socket[bytes]") -> None:
    """Of everybody who connects: the watch says which keys are let in."""
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a watch nobody is let in, instead of everybody


def expect_key(socket: "zmq.Socket[bytes]", public: bytes) -> None:
    """At the other end. Raises WireError for what is no public key."""
    try:
        socket.set(zmq.CURVE_SERVERKEY, public)
    except zmq.ZMQError as error:
        raise WireError(f"{public.hex() or 'nothing'} is not the public key of a socket") from error


def set_key_pair(socket: "zmq.Socket[bytes]", pair: ServerKeys | RelayKeys | ClientKey) -> None:
    """Raises WireError when its halves do not belong together."""
    if z85.decode(zmq.curve_public(z85.encode(pair.secret))) != pair.public:
        raise WireError(f"the public and the secret key of {pair} do not belong together; make new keys")
    socket.set(zmq.CURVE_PUBLICKEY, pair.public)
    socket.set(zmq.CURVE_SECRETKEY, pair.secret)
