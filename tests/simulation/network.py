"""Network: lines between server processes and the coordinator, as ZeroMQ draws them over TCP.

A connection keeps its messages in order and loses none, until it is cut. Then those on the way are lost, or arrive
late, after what was sent over the next connection; what the server says meanwhile waits in its socket.
"""

from collections import deque
from typing import TYPE_CHECKING, Protocol

from common.messages import CoordinatorToServer, ServerToCoordinator
from common.wire import Peer

if TYPE_CHECKING:
    from tests.simulation.coordinator import SimulatedCoordinator
    from tests.simulation.world import World

Unreadable = str  # what came is no message; this says why
Said = ServerToCoordinator | Unreadable

LATE_SHARE = 0.4  # of the cuts, after which what was on the way arrives all the same


class Listener(Protocol):
    def hear(self, message: CoordinatorToServer) -> None: ...


class Connection:
    """One TCP connection to one coordinator process."""

    __slots__ = (
        "carries_down", "carries_up", "coordinator", "held_down", "held_up", "last_down", "last_up", "late_until",
        "line", "peer",
    )  # fmt: skip

    def __init__(self, line: "Line", peer: Peer, coordinator: "SimulatedCoordinator") -> None:
        self.line = line
        self.peer = peer
        self.coordinator = coordinator
        self.carries_up = self.carries_down = True
        self.last_up = self.last_down = 0.0  # when the last message arrives
        self.late_until = 0.0
        self.held_up: deque[tuple[Said, bytes]] = deque()  # arrived, as far as the stall lets them
        self.held_down: deque[CoordinatorToServer] = deque()


class Line:
    """The socket of one server process. It connects again by itself."""

    def __init__(self, world: "World", key: str, listener: Listener) -> None:
        self._world = world
        self._key = key
        self._listener = listener
        self._connection: Connection | None = None
        self._waiting: deque[tuple[Said, bytes]] = deque()
        self._stalled_until = 0.0
        self.is_closed = False

    def connect(self) -> None:
        coordinator = self._world.coordinator
        if self.is_closed or self._connection is not None or coordinator is None or not coordinator.is_listening:
            return
        peer = Peer(self._world.new_routing_id(), self._key)
        self._connection = coordinator.connections[peer] = Connection(self, peer, coordinator)
        while self._waiting:
            self.send(*self._waiting.popleft())

    def send(self, message: Said, payload: bytes = b"") -> None:
        connection = self._connection
        if connection is None:
            self._waiting.append((message, payload))
            return
        connection.last_up = when = max(connection.last_up, self._world.clock.now + self._delay_s())
        for _ in range(self._copies()):
            self._world.clock.at(when, self._arrive_up, connection, message, payload)

    def deliver(self, connection: Connection, message: CoordinatorToServer) -> None:
        """The coordinator sends over `connection`."""
        connection.last_down = when = max(connection.last_down, self._world.clock.now + self._delay_s())
        for _ in range(self._copies()):
            self._world.clock.at(when, self._arrive_down, connection, message)

    def stall(self, duration_s: float) -> None:
        """Nothing gets through for a while; TCP sends it again afterwards."""
        self._stalled_until = max(self._stalled_until, self._world.clock.now + duration_s)

    def cut(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        world = self._world
        connection.carries_down = False
        if world.rng.random() < LATE_SHARE:
            connection.late_until = world.clock.now + world.rng.uniform(0.0, 3.0)
        else:
            connection.carries_up = False
        world.clock.after(world.rng.uniform(0.01, 1.0), self.connect)

    def close(self) -> None:
        """The process is gone. The system sends what is in its buffers, if the network lets it."""
        self.is_closed = True
        self.cut()

    def _delay_s(self) -> float:
        return 2.0 * self._world.plan.latency_s * self._world.rng.random()

    def _copies(self) -> int:
        duplicated = self._world.plan.duplicated
        return 2 if duplicated and self._world.rng.random() < duplicated else 1

    def _arrive_up(self, connection: Connection, message: Said, payload: bytes) -> None:
        connection.held_up.append((message, payload))
        if len(connection.held_up) == 1:
            self._release_up(connection)

    def _release_up(self, connection: Connection) -> None:
        """In order, and none before the stall is over."""
        wait_until = max(self._stalled_until, connection.late_until)
        if self._world.clock.now < wait_until:
            self._world.clock.at(wait_until, self._release_up, connection)
            return
        held = connection.held_up
        while held:
            if connection.carries_up:
                connection.coordinator.hear(connection.peer, *held[0])
            held.popleft()

    def _arrive_down(self, connection: Connection, message: CoordinatorToServer) -> None:
        connection.held_down.append(message)
        if len(connection.held_down) == 1:
            self._release_down(connection)

    def _release_down(self, connection: Connection) -> None:
        if self._world.clock.now < self._stalled_until:
            self._world.clock.at(self._stalled_until, self._release_down, connection)
            return
        held = connection.held_down
        while held:
            if connection.carries_down:
                self._listener.hear(held[0])
            held.popleft()
