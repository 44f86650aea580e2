"""Evaluating: the evaluation tasks of one simulated server process. It does what rollout_server/evaluations.py does."""

from typing import TYPE_CHECKING

from common.messages import Evaluate, Evaluated, EvaluatedEpisode, EvaluationFailed, HoldVersions
from tests.simulation import history as seen

if TYPE_CHECKING:
    from tests.simulation.server_process import ServerProcess

NUM_TOKENS = 8


class Evaluating:
    """Each task from when it is granted until it is done, or void."""

    def __init__(self, process: "ServerProcess") -> None:
        self._process = process
        self._world = process.world
        self._working: dict[int, Evaluate] = {}

    def hold(self, message: HoldVersions) -> None:
        for evaluation_id, task in list(self._working.items()):
            if not message.first <= task.version <= message.last:
                del self._working[evaluation_id]
        self._process.weights.hold(message.first, message.last)
        if self._process.weights.holding >= 0:
            self._process.say_alive()

    def drop_all(self) -> None:
        self._working.clear()
        self._process.weights.hold(0, -1)

    def begin(self, task: Evaluate) -> None:
        if task.evaluation_id in self._working:
            return
        self._working[task.evaluation_id] = task
        self._process.weights.when_loaded(task.version, self._begin, task)

    def _begin(self, task: Evaluate) -> None:
        if self._working.get(task.evaluation_id) is not task:
            return
        if self._process.weights.loaded != task.version:
            self._fail(task, "version_gone")
            return
        length = self._world.length_of(-1 - task.task_id)
        duration_s = self._process.plan.median_s * length
        self._world.clock.after(duration_s, self._finish, task, self._world.clock.now)

    def _finish(self, task: Evaluate, started_at: float) -> None:
        if not self._process.is_running(self._finish, task, started_at, needs_engine=True):
            return
        if self._working.get(task.evaluation_id) is not task:
            return
        versions = self._process.weights.versions(started_at, self._world.clock.now - started_at, NUM_TOKENS)
        if self._world.rng.random() < self._world.failing():
            self._fail(task, "environment_error")
        elif set(versions) != {task.version}:
            self._fail(task, "version_gone")
        else:
            del self._working[task.evaluation_id]
            self._say(task, min(versions), max(versions))

    def _fail(self, task: Evaluate, kind: str) -> None:
        del self._working[task.evaluation_id]
        self._process.line.send(EvaluationFailed(evaluation_id=task.evaluation_id, kind=kind, reason="simulated"))

    def _say(self, task: Evaluate, oldest: int, newest: int) -> None:
        nonce = self._world.new_nonce()
        now = self._world.clock.now
        self._world.note(seen.EvaluationSampled(now, self._process.epoch, task.task_id, nonce, oldest, newest))
        episode = EvaluatedEpisode(
            reward=float(nonce), num_tokens=NUM_TOKENS, terminated=True, oldest_version=oldest, newest_version=newest
        )
        episodes = [episode] * task.samples
        said = {"evaluation_id": task.evaluation_id, "task_id": task.task_id, "version": task.version}
        if self._process.plan.lies:
            lie = self._world.rng.choice(["", "task", "version", "number", "tokens"])
            said["task_id"] += lie == "task"
            said["version"] += lie == "version"
            episodes += [episode] * (lie == "number")
            if lie == "tokens":
                episodes[0] = EvaluatedEpisode(
                    reward=float(nonce), num_tokens=1, terminated=True, oldest_version=oldest, newest_version=newest + 1
                )
        self._process.line.send(Evaluated(**said, episodes=tuple(episodes)))
