"""Who may connect: answers ZeroMQ's question about each new connection (ZeroMQ RFC 27, ZAP) from the allow-list."""

import logging
import threading
import time
from contextlib import suppress
from pathlib import Path

import zmq

from common.keys import AllowList

logger = logging.getLogger(__name__)

ZAP_DOMAIN = b"countercurrent"
REFUSAL_LOG_S = 10.0

_LET_IN = b"200"
# "Temporarily": the connection is closed without a word, and the peer tries again, until its key is allowed perhaps.
# After a final refusal (400) ZeroMQ would not try again, and a server had to be restarted to be let in.
_REFUSED = b"300"


class Doorkeeper:
    """The decision about one connection after the other. The name a peer gets here is its proven public key, in hex."""

    def __init__(self, directory: Path) -> None:
        self._allowed = AllowList(directory)
        self._refused = 0  # since they were last logged
        self._logged_s = -REFUSAL_LOG_S

    def answer(self, request: list[bytes]) -> list[bytes]:
        version, request_id, _domain, _address, _routing_id, mechanism, *credentials = request
        if mechanism == b"CURVE" and self._allowed.name_of(credentials[0]) is not None:
            return [version, request_id, _LET_IN, b"OK", credentials[0].hex().encode(), b""]
        self._refused += 1
        if time.monotonic() - self._logged_s >= REFUSAL_LOG_S:
            self._log(credentials[0].hex()[:8] if mechanism == b"CURVE" else "none")
        return [version, request_id, _REFUSED, b"not on the allow-list", b"", b""]

    def _log(self, last_key: str) -> None:
        logger.warning(
            "refused %d connections; the key of the last one, %s..., is not on %s",
            self._refused,
            last_key,
            self._allowed,
        )
        self._refused, self._logged_s = 0, time.monotonic()


def start_doorkeeper(context: "zmq.Context[zmq.Socket[bytes]]", directory: Path) -> None:
    """A thread that ends with the context. If it should die earlier, nobody is let in any more."""
    socket = context.socket(zmq.REP)
    socket.bind("inproc://zeromq.zap.01")
    threading.Thread(target=_answer_all, args=(socket, Doorkeeper(directory)), name="doorkeeper", daemon=True).start()


def _answer_all(socket: "zmq.Socket[bytes]", doorkeeper: Doorkeeper) -> None:
    with socket, suppress(zmq.ContextTerminated):
        while True:
            socket.send_multipart(doorkeeper.answer(socket.recv_multipart()))
