"""Lifeline: connects a dealer again when ZeroMQ would not.

A connection whose other end is gone without a word looks alive until the kernel gives it up, which takes a quarter of
an hour when something is on its way. And ZeroMQ tries again after a connection broke, but not after it carried bytes
that are no ZMTP, or a frame over the limit: then the session ends for ever (session_base.cpp, engine_error). One
damaged packet, or another service that answered at the address for a moment, would leave a rollout server deaf until
somebody restarts it.
"""

import logging
import struct
from contextlib import suppress

import zmq

logger = logging.getLogger(__name__)

_MONITOR_ADDRESS = "inproc://monitor"
_EVENTS = zmq.Event.CONNECTED | zmq.Event.CONNECT_DELAYED | zmq.Event.CONNECT_RETRIED | zmq.Event.DISCONNECTED


class Lifeline:
    """Of one dealer's socket, which must not be connected yet. Used by the thread that uses the socket."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", socket: "zmq.Socket[bytes]", address: str) -> None:
        self._socket = socket
        self._address = address
        self._last_event = 0
        self._is_dead = False  # at the last look
        socket.monitor(_MONITOR_ADDRESS, _EVENTS)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.connect(_MONITOR_ADDRESS)

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()

    def look(self) -> None:
        """Call about once a second. A connection that ended before the last call, and is not being retried, is made
        anew; what ZeroMQ still had to send over it is lost, as it is with every connection that breaks."""
        self._hear_events()
        was_dead, self._is_dead = self._is_dead, self._last_event == zmq.Event.DISCONNECTED
        if was_dead and self._is_dead:
            logger.warning("the connection to %s broke on bytes that make no sense; connecting again", self._address)
            self.connect_again()

    def connect_again(self) -> None:
        """Give up the connection, if there is one, for another."""
        with suppress(zmq.ZMQError):  # there may be nothing left to disconnect
            self._socket.disconnect(self._address)
        self._socket.connect(self._address)
        self._is_dead = False

    def _hear_events(self) -> None:
        with suppress(zmq.Again):
            while True:
                self._last_event, _ = struct.unpack("=HI", self._monitor.recv_multipart(zmq.NOBLOCK)[0])
