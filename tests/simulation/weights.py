"""Weights: which version a simulated server has loaded, when, and what it does until a newer one is there."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.server_process import ServerProcess

NO_VERSION = -1
ASK_AGAIN_S = 0.5


class Weights:
    """Follows what the learner publishes, while generation goes on."""

    def __init__(self, process: "ServerProcess") -> None:
        self._process = process
        self._clock = process.world.clock
        self._run_id = ""
        self._published = NO_VERSION
        self._loads: list[tuple[float, int]] = [(0.0, NO_VERSION)]  # when, version
        self._waiting: list[tuple[int, Callable[..., None], Any]] = []
        self._is_pulling = False

    @property
    def loaded(self) -> int:
        return self._loads[-1][1]

    def follow(self, run_id: str) -> None:
        """Versions of another start of the learner mean nothing here."""
        self._waiting.clear()
        if run_id != self._run_id:
            self._run_id = run_id
            self._published = NO_VERSION
            self._loads = [(self._clock.now, NO_VERSION)]

    def announce(self, published: int) -> None:
        self._published = max(self._published, published)
        self._pull()

    def when_loaded(self, version: int, action: Callable[..., None], argument: Any) -> None:
        if self.loaded >= max(version, 0):
            action(argument)
        else:
            self._waiting.append((max(version, 0), action, argument))

    def versions(self, start: float, duration_s: float, number: int) -> list[int]:
        """What sampled each of `number` tokens, evenly spread over the time."""
        loads, place = self._loads, 0
        versions = []
        for index in range(number):
            when = start + duration_s * (index + 0.5) / number
            while place + 1 < len(loads) and loads[place + 1][0] <= when:
                place += 1
            versions.append(loads[place][1])
        return versions

    def _pull(self) -> None:
        if self._is_pulling or self._published <= self.loaded:
            return
        self._is_pulling = True
        newest = self._process.world.learner.newest_snapshot(self._run_id)
        pull_s = self._process.world.plan.pulling_s * (0.5 + self._process.world.rng.random())
        if self.loaded < newest <= self._published:
            self._clock.after(pull_s, self._pulled, self._run_id, newest)
        else:
            self._clock.after(ASK_AGAIN_S, self._ask_again)

    def _ask_again(self) -> None:
        if self._process.is_running(self._ask_again):
            self._is_pulling = False
            self._pull()

    def _pulled(self, run_id: str, version: int) -> None:
        if not self._process.is_running(self._pulled, run_id, version, needs_engine=True):
            return
        self._is_pulling = False
        if run_id == self._run_id:
            self._loads.append((self._clock.now, version))
            ready = [waiting for waiting in self._waiting if waiting[0] <= version]
            self._waiting = [waiting for waiting in self._waiting if waiting[0] > version]
            for _, action, argument in ready:
                action(argument)
        self._pull()
