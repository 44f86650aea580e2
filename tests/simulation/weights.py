"""Weights: which version a simulated server has loaded, when, and what it does until a newer one is there."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.server_process import ServerProcess

NO_VERSION = -1
ASK_AGAIN_S = 0.5
HELD_S = 0.1


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
        self._held = (0, NO_VERSION)  # first and last version to hold; an empty range
        self._ran_out = NO_VERSION  # version that was held for as long as may be
        self._newer_since: float | None = None  # while a version is held

    @property
    def holding(self) -> int:
        """NO_VERSION when no version is held."""
        first, last = self._held
        return self.loaded if first <= self.loaded <= last and self.loaded != self._ran_out else NO_VERSION

    def hold(self, first: int, last: int) -> None:
        self._held = (first, last)
        self._pull()

    @property
    def loaded(self) -> int:
        return self._loads[-1][1]

    def follow(self, run_id: str) -> None:
        """Versions of another start of the learner mean nothing here."""
        self._waiting.clear()
        if run_id != self._run_id:
            self._run_id = run_id
            self._held, self._ran_out = (0, NO_VERSION), NO_VERSION
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
        if self._is_pulling or self._published <= self.loaded or self._is_held():
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
        if run_id == self._run_id and self._is_held():  # until it is told otherwise, or time is up
            self._clock.after(HELD_S, self._pulled, run_id, version)
            return
        self._is_pulling = False
        if run_id == self._run_id:
            self._newer_since = None
            self._loads.append((self._clock.now, version))
            ready = [waiting for waiting in self._waiting if waiting[0] <= version]
            self._waiting = [waiting for waiting in self._waiting if waiting[0] > version]
            for _, action, argument in ready:
                action(argument)
            if self.holding != NO_VERSION:
                self._process.say_alive()
        self._pull()

    def _is_held(self) -> bool:
        """Whether a version that is there must wait; the time for that begins with the first one."""
        if self.holding == NO_VERSION:
            self._newer_since = None
            return False
        if self._newer_since is None:
            self._newer_since = self._clock.now
            self._clock.after(self._process.world.plan.hold_s, self._run_out, self.loaded)
        return True

    def _run_out(self, version: int) -> None:
        if self.holding == version and self._process.is_running(self._run_out, version):
            self._ran_out = version
            self._process.say_alive()
            self._pull()
