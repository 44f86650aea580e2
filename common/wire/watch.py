"""Watch: a thread beside each router that decides who is let in and who is sent away, and bounds their memory.

It is a thread, and not a part of the event loop, because a peer can fill the memory while the event loop is busy.
"""

import logging
import math
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import zmq

from common.keys import AllowList, GivenKeys
from common.memory import MemoryBound, give_back_memory
from common.wire.connections import Connections, Ending, Limits
from common.wire.doorkeeper import Doorkeeper
from common.wire.refusals import Reason, Refusals

logger = logging.getLogger(__name__)

LOOK_S = 0.1
RELIEF_S = 0.2  # for memory to come back after connections were cut
LOOK_SHARE = 0.05  # of the time at most, however many connections there are
ALLOW_LIST_S = 0.5

_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_MONITOR_ADDRESS = "inproc://monitor"
# No event of an error while ZeroMQ decodes: telling it overwrites errno, and ZeroMQ takes the error for "not now".
_EVENTS = zmq.Event.ACCEPTED | zmq.Event.DISCONNECTED


class Watch:
    """What happens at a router's connections beside their messages. Parts that are None do not take place."""

    def __init__(
        self,
        limits: Limits,
        *,
        allowed: AllowList | GivenKeys | None = None,
        memory: MemoryBound | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """allowed: who may connect; None: everybody."""
        self.refusals = Refusals()
        self._limits = limits
        self._doorkeeper = Doorkeeper(allowed, self.refusals) if allowed is not None else None
        self._connections: Connections | None = None
        self._memory = memory
        self._now = now
        self._relief_until_s = -math.inf
        self._strangers_gone = 0
        self._has_cut = False  # at the last look

    def __repr__(self) -> str:
        return f"<Watch {self._connections!r}, {self._memory!r}, {self.refusals!r}>"

    @property
    def asks_for_keys(self) -> bool:
        return self._doorkeeper is not None

    @property
    def revoked(self) -> frozenset[str]:
        """Keys that were let in and are not on the allow-list any more."""
        return self._doorkeeper.revoked if self._doorkeeper is not None else frozenset()

    @property
    def connections_ended(self) -> int:
        return self._connections.num_ended if self._connections is not None else 0

    def bound(self, router: "zmq.Socket[bytes]") -> None:
        """The router's socket has its address now. Only TCP connections are counted."""
        endpoint = router.get(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        if endpoint.startswith(b"tcp://"):
            port = int(endpoint.rstrip(b"\0").rpartition(b":")[2])
            self._connections = Connections(port, self.refusals, self._limits)

    def note(self, descriptor: int, key: str, num_bytes: int) -> None:
        """A message was received. Called by the thread that receives, everything else by the watch's own."""
        if self._connections is not None:
            self._connections.note(descriptor, key, num_bytes)

    def answer(self, request: list[bytes]) -> list[bytes]:
        assert self._doorkeeper is not None
        return self._doorkeeper.answer(request)

    def hear(self, event: int, descriptor: int) -> None:
        """What ZeroMQ says about one connection."""
        if self._connections is None:
            return
        if event == zmq.Event.ACCEPTED:
            self._connections.accept(descriptor)
        elif event == zmq.Event.DISCONNECTED and self._connections.ended(descriptor) is Ending.UNHEARD:
            if self._strangers_gone < self.refusals.of(Reason.STRANGER):  # each of them ends unheard, and is counted
                self._strangers_gone += 1
            else:
                self.refusals.note(Reason.UNHEARD, "port scans and wrong addresses do that too")

    def look_at_keys(self) -> None:
        if self._doorkeeper is not None:
            self._doorkeeper.look()

    def look_at_connections(self) -> None:
        """Find out who holds how much, and end what may not be."""
        if self._connections is None:
            return
        if self._has_cut:
            give_back_memory()  # ZeroMQ has freed it meanwhile
        cut_before = self.refusals.of(Reason.OVERLONG)
        self._connections.look(self.revoked)
        self._bound_memory(self._connections)
        self._has_cut = self.refusals.of(Reason.OVERLONG) > cut_before

    def _bound_memory(self, connections: Connections) -> None:
        """Those who hold most go first."""
        if self._memory is None or self._now() < self._relief_until_s:
            return
        excess_bytes = self._memory.excess_bytes()
        while excess_bytes > 0 and (cut_bytes := connections.cut_heaviest()):
            excess_bytes -= cut_bytes
            self._relief_until_s = self._now() + RELIEF_S


@contextmanager
def watching(context: "zmq.Context[zmq.Socket[bytes]]", router: "zmq.Socket[bytes]", watch: Watch) -> Iterator[None]:
    """The router's socket is to be bound inside; from then on it is watched, until its context ends."""
    with ExitStack() as stack:
        zap = stack.enter_context(_open_zap_socket(context)) if watch.asks_for_keys else None
        monitor = stack.enter_context(_open_monitor(context, router))
        yield
        watch.bound(router)
        threading.Thread(target=_watch, args=(watch, zap, monitor), name="doorkeeper", daemon=True).start()
        stack.pop_all()  # the thread closes them


def _open_zap_socket(context: "zmq.Context[zmq.Socket[bytes]]") -> "zmq.Socket[bytes]":
    """Where ZeroMQ asks about connections."""
    socket = context.socket(zmq.REP)
    socket.bind(_ZAP_ADDRESS)
    return socket


def _open_monitor(context: "zmq.Context[zmq.Socket[bytes]]", router: "zmq.Socket[bytes]") -> "zmq.Socket[bytes]":
    """Where ZeroMQ tells about connections."""
    router.monitor(_MONITOR_ADDRESS, _EVENTS)
    socket = context.socket(zmq.PAIR)
    socket.connect(_MONITOR_ADDRESS)
    return socket


def _watch(watch: Watch, zap: "zmq.Socket[bytes] | None", monitor: "zmq.Socket[bytes]") -> None:
    has_ended = False
    try:
        with ExitStack() as stack, suppress(zmq.ContextTerminated):
            poller = zmq.Poller()
            for socket in filter(None, (zap, monitor)):
                poller.register(stack.enter_context(socket), zmq.POLLIN)
            _watch_until_terminated(watch, poller, zap, monitor)
        has_ended = True
    finally:
        if not has_ended:
            logger.critical("a router cannot be left unwatched; this process ends", exc_info=sys.exc_info())
            os.kill(os.getpid(), signal.SIGKILL)


def _watch_until_terminated(
    watch: Watch, poller: zmq.Poller, zap: "zmq.Socket[bytes] | None", monitor: "zmq.Socket[bytes]"
) -> None:
    connections_due_s = keys_due_s = time.monotonic()
    while True:
        wait_s = max(0.0, min(connections_due_s, keys_due_s) - time.monotonic())
        ready = dict(poller.poll(math.ceil(1e3 * wait_s)))
        if zap is not None and zap in ready:
            zap.send_multipart(watch.answer(zap.recv_multipart()))
        if monitor in ready:
            watch.hear(*struct.unpack("=HI", monitor.recv_multipart()[0]))
        started_s = time.monotonic()
        if started_s >= keys_due_s:
            watch.look_at_keys()
            keys_due_s = started_s + ALLOW_LIST_S
        if started_s >= connections_due_s:
            watch.look_at_connections()
            ended_s = time.monotonic()
            connections_due_s = ended_s + max(LOOK_S, (ended_s - started_s) / LOOK_SHARE)
