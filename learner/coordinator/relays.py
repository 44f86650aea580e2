"""RelayTree: from whom each rollout server pulls weights, where servers give them on to each other. Pure rules."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.messages import RelayPlace, RelayPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayServer:
    """A server that pulls over the network and gives on what it has pulled."""

    server_id: str
    address: str
    relay_key: bytes  # of the socket there
    own_key: bytes  # that it shows where it connects; empty where there are no keys


class RelayTree:
    """The learner and every server serve at most `fan_out` servers, as near to the learner as there is room.

    Whoever has a place keeps it while it and the one it pulls from are there: a change would cost connections. A server
    whose source left keeps those who pull from it, and takes the first place that is free.
    """

    def __init__(self, fan_out: int) -> None:
        self._fan_out = fan_out
        self._source: dict[str, str | None] = {}  # by server, whom it pulls from; None: the learner
        self._pulling: dict[str | None, list[str]] = {}  # the other way round
        self._servers: tuple[RelayServer, ...] = ()
        self._plans: dict[str, RelayPlan] = {}

    def __repr__(self) -> str:
        direct = len(self._pulling.get(None, ()))
        return f"<RelayTree of {self._fan_out}: {direct} of {len(self._source)} servers pull from the learner>"

    def plans(self, servers: Sequence[RelayServer]) -> dict[str, RelayPlan]:
        """By server. servers: all that take part now; their order decides between equals."""
        if tuple(servers) != self._servers:
            self._servers = tuple(servers)
            by_id = {server.server_id: server for server in servers}
            self._place(by_id)
            levels = self._levels()
            self._plans = {server: self._plan(server, by_id, levels[server]) for server in by_id}
        return self._plans

    def _place(self, by_id: dict[str, RelayServer]) -> None:
        self._source = {
            server: source
            for server, source in self._source.items()
            if server in by_id and (source is None or source in by_id)
        }
        waiting = [server for server in by_id if server not in self._source]
        self._pulling = {node: [] for node in (None, *by_id)}
        for server, source in self._source.items():
            self._pulling[source].append(server)
        for server, source in zip(waiting, self._open_places(), strict=False):
            self._source[server] = source
            self._pulling[source].append(server)

    def _open_places(self) -> Iterator[str | None]:
        """Whom one more could pull from, the nearest to the learner first; who has got a place opens others."""
        nodes: deque[str | None] = deque([None])
        while nodes:
            pulling = self._pulling[nodes[0]]
            while len(pulling) < self._fan_out:
                yield nodes[0]
            nodes.popleft()
            nodes.extend(pulling)

    def _levels(self) -> dict[str | None, int]:
        """Relays between each server and the learner."""
        levels: dict[str | None, int] = {None: -1}
        nodes: deque[str | None] = deque([None])
        while nodes:
            node = nodes.popleft()
            levels |= dict.fromkeys(self._pulling[node], levels[node] + 1)
            nodes.extend(self._pulling[node])
        return levels

    def _plan(self, server: str, by_id: dict[str, RelayServer], level: int) -> RelayPlan:
        place = None
        if (source := self._source[server]) is not None:
            relay = by_id[source]
            place = RelayPlace(server=source[:256], address=relay.address, key=relay.relay_key, level=level)
        admitted = {by_id[other].own_key for other in self._pulling[server]}
        return RelayPlan(source=place, admitted=tuple(sorted(admitted - {b""})))
