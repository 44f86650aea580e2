"""Sessions: which connection speaks for which server. A server may lose its connection and come back on another."""

from collections.abc import Iterator
from dataclasses import dataclass

from common.messages import Heartbeat, Hello
from common.wire import Peer

MAX_SESSIONS = 1 << 14
MAX_NAME = 64


@dataclass(slots=True, kw_only=True)
class Session:
    """One start of a rollout server, from its Hello on."""

    server_id: str  # for people and for the core; unique among the sessions
    peer: Peer  # the connection it was last heard on
    epoch: str
    heard_at: float
    greeted_us: int = 0  # when its last Hello was said, on the server's clock
    ready: bool = False
    heartbeat: Heartbeat | None = None

    @property
    def holder(self) -> str:
        """Names this start of this server, under its key, to coordinators that never heard of the session."""
        return f"{self.peer.key} {self.epoch}"


class GreetingRefused(ValueError):
    """The server cannot have a session; the text says why and what to do."""


class Sessions:
    """Finds sessions by connection and by server."""

    def __init__(self) -> None:
        self._by_peer: dict[Peer, Session] = {}
        self._by_server: dict[str, Session] = {}
        self._by_epoch: dict[tuple[str, str], Session] = {}  # (key, epoch)

    def __len__(self) -> int:
        return len(self._by_server)

    def __iter__(self) -> Iterator[Session]:
        return iter(list(self._by_server.values()))

    def greet(self, hello: Hello, *, peer: Peer, now: float) -> Session:
        """The session of the server that says Hello: the one it had, if it was only cut off, else a new one.

        A restarted server has another epoch, so it is another server. Raises GreetingRefused.
        """
        session = self._by_epoch.get((peer.key, hello.epoch))
        present = self._by_peer.get(peer)
        if present is not None and present is not session:
            raise GreetingRefused(f"this connection speaks for server {present.server_id} already; open another one")
        if session is not None and hello.said_us < session.greeted_us:
            raise GreetingRefused("this connection is an old one: a later Hello of this server came over another")
        if session is None:
            if len(self) >= MAX_SESSIONS:
                raise GreetingRefused(f"{MAX_SESSIONS} servers have joined already; try again when one has left")
            session = Session(server_id=self._free_name(hello), peer=peer, epoch=hello.epoch, heard_at=now)
        self._by_peer.pop(session.peer, None)
        session.peer, session.heard_at, session.greeted_us = peer, now, hello.said_us
        self._by_peer[peer] = self._by_server[session.server_id] = session
        self._by_epoch[peer.key, hello.epoch] = session
        return session

    def _free_name(self, hello: Hello) -> str:
        name = "".join(letter if letter.isprintable() else "?" for letter in hello.server[:MAX_NAME]) or "unnamed"
        number = 2
        server_id = name
        while server_id in self._by_server:
            server_id = f"{name}#{number}"
            number += 1
        return server_id

    def of_peer(self, peer: Peer) -> Session | None:
        return self._by_peer.get(peer)

    def of_server(self, server_id: str) -> Session | None:
        return self._by_server.get(server_id)

    def end(self, session: Session) -> None:
        self._by_server.pop(session.server_id, None)
        self._by_epoch.pop((session.peer.key, session.epoch), None)
        if self._by_peer.get(session.peer) is session:
            del self._by_peer[session.peer]
