"""SimulatedServer: a machine on which one rollout server process after the other lives, until it crashes or leaves."""

from typing import TYPE_CHECKING

from tests.simulation import history as seen
from tests.simulation.plan import ServerPlan
from tests.simulation.server_process import ServerProcess

if TYPE_CHECKING:
    from tests.simulation.world import World


class SimulatedServer:
    """Starts processes, and ends them."""

    def __init__(self, world: "World", plan: ServerPlan) -> None:
        self.world = world
        self.plan = plan
        self.process: ServerProcess | None = None
        self._starts = 0
        world.clock.at(plan.starts_at, self.start)

    def start(self) -> None:
        """A new process, which is a new epoch, unless there is one."""
        if self.process is not None:
            return
        self._starts += 1
        epoch = f"{self.plan.name}.{self._starts}"
        self.world.note(seen.ServerStarted(self.world.clock.now, epoch, self.plan.key, not self.plan.lies))
        self.process = ServerProcess(self, epoch)

    def stop(self, how: str) -> None:
        """The process is gone; another one comes after a while."""
        process, self.process = self.process, None
        if process is None:
            return
        self.world.note(seen.ServerStopped(self.world.clock.now, process.epoch, how))
        process.end()
        self.world.clock.after(self.world.rng.uniform(0.3, 4.0), self.start)

    def leave(self) -> None:
        """SIGTERM."""
        if self.process is not None:
            self.process.say_goodbye()
            self.stop("left")
