"""Faults: what goes wrong, by name, at the moment it does."""

from typing import TYPE_CHECKING

from tests.simulation import history as seen
from tests.simulation.server_process import ServerProcess

if TYPE_CHECKING:
    from tests.simulation.world import World


class Faults:
    """Each method is one kind of fault that a plan may ask for."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._rng = world.rng

    def happen(self, kind: str) -> None:
        who = getattr(self, f"_{kind}")()
        self._world.note(seen.WentWrong(self._world.clock.now, kind, who or ""))

    def _process(self) -> ServerProcess | None:
        return self._rng.choice(self._world.servers).process

    def _cut(self) -> str:
        process = self._process()
        if process is None:
            return ""
        process.line.cut()
        while self._rng.random() < 0.4:  # and soon again
            self._world.clock.after(self._rng.uniform(0.0, 1.0), process.line.cut)
        return process.epoch

    def _partition(self) -> None:
        """Some of the servers hear nothing for a while, and nobody hears them; connections may break over it."""
        duration_s = self._rng.choice([0.5, 2.0, 4.0, 8.0])
        for line in self._world.lines():
            if self._rng.random() < 0.6:
                line.stall(duration_s)
                if self._rng.random() < 0.3:
                    self._world.clock.after(duration_s * 0.9, line.cut)

    def _server_crash(self) -> None:
        self._rng.choice(self._world.servers).stop("crashed")

    def _server_leave(self) -> None:
        self._rng.choice(self._world.servers).leave()

    def _server_hang(self) -> str:
        """Never for ever at the server that is always honest: somebody healthy must be left."""
        server = self._rng.choice(self._world.servers)
        longest_s = 300.0 if server is not self._world.servers[0] else 20.0
        if server.process is None:
            return ""
        server.process.hang(self._rng.choice([3.0, 12.0, 12.0, longest_s]))
        return server.process.epoch

    def _server_pause(self) -> str:
        process = self._process()
        if process is None:
            return ""
        process.stop(self._rng.choice([1.0, 1.0, 1.0, 4.0, 7.0]))
        return process.epoch

    def _coordinator_crash(self) -> None:
        self._world.end_coordinator(self._world.coordinator)

    def _coordinator_pause(self) -> None:
        if self._world.coordinator is not None:
            self._world.coordinator.pause(self._rng.choice([1.0, 3.0, 9.0]))

    def _learner_crash(self) -> None:
        self._world.learner.crash()

    def _learner_pause(self) -> None:
        self._world.learner.stop(self._rng.choice([1.0, 4.0]))

    def _slow_disk(self) -> None:
        self._world.slow_disk(self._rng.choice([0.3, 1.5]))

    def _outage(self) -> None:
        """The environment is down: every lease fails, everywhere."""
        self._world.outage(self._rng.choice([1.0, 4.0]))
