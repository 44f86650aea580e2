"""Evaluations: this server's part in evaluating a version, beside its leases. Nothing of it is kept or sent twice."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable

from common import messages
from common.messages import Evaluate, EvaluatedEpisode
from common.trajectory import FinishReason, Group, Trajectory
from rollout_server.episodes import EpisodeRunner
from rollout_server.lease_failure import LeaseFailure
from rollout_server.weight_receiver import WeightReceiver

logger = logging.getLogger(__name__)

VERSION_GONE = "version_gone"
MAX_REASON_CHARS = 4096


class Evaluations:
    """Evaluation tasks that are being worked on, each from when it is granted until it is done or void."""

    def __init__(self, receiver: WeightReceiver, say: Callable[[messages.Message], Awaitable[None]]) -> None:
        self._receiver = receiver
        self._say = say
        self._working: dict[int, tuple[Evaluate, asyncio.Task[None]]] = {}

    def __len__(self) -> int:
        return len(self._working)

    def __contains__(self, evaluation_id: int) -> bool:
        return evaluation_id in self._working

    def begin(self, evaluate: Evaluate, work: asyncio.Task[None]) -> None:
        """`work` is running work(evaluate, ...)."""
        self._working[evaluate.evaluation_id] = (evaluate, work)

    async def hold(self, hold: messages.HoldVersions) -> None:
        """Tasks of versions outside the range are void."""
        await self._receiver.hold(hold.first, hold.last)
        for evaluate, _ in list(self._working.values()):
            if not hold.first <= evaluate.version <= hold.last:
                self._drop(evaluate.evaluation_id)

    def drop_all(self) -> None:
        for evaluation_id in list(self._working):
            self._drop(evaluation_id)

    async def work(self, evaluate: Evaluate, runner: EpisodeRunner) -> None:
        """Do the task and say what came of it."""
        try:
            episodes = await self._evaluate(evaluate, runner)
        except LeaseFailure as failure:
            logger.info("evaluation task %d (%s): %s", evaluate.task_id, failure.kind, failure.reason)
            answer: messages.Message = messages.EvaluationFailed(
                evaluation_id=evaluate.evaluation_id, kind=failure.kind, reason=failure.reason[:MAX_REASON_CHARS]
            )
        else:
            answer = messages.Evaluated(
                evaluation_id=evaluate.evaluation_id,
                task_id=evaluate.task_id,
                version=evaluate.version,
                episodes=episodes,
            )
        self._working.pop(evaluate.evaluation_id, None)
        await self._say(answer)

    async def _evaluate(self, evaluate: Evaluate, runner: EpisodeRunner) -> tuple[EvaluatedEpisode, ...]:
        """Raises LeaseFailure, also when not all tokens are of the version."""
        await self._receiver.wait_for_version(evaluate.version)
        if self._receiver.loaded_version != evaluate.version:
            reason = f"version {self._receiver.loaded_version} is loaded, {evaluate.version} is to be evaluated"
            raise LeaseFailure(VERSION_GONE, reason)
        episodes = episodes_of(await runner.run_evaluation(evaluate))
        newest = max(episode.newest_version for episode in episodes)
        if newest != evaluate.version:
            reason = f"version {newest} was loaded before the episodes of version {evaluate.version} were done"
            raise LeaseFailure(VERSION_GONE, reason)
        return episodes

    def _drop(self, evaluation_id: int) -> None:
        _, work = self._working.pop(evaluation_id)
        if work is not asyncio.current_task():
            work.cancel()


def episodes_of(group: Group) -> tuple[EvaluatedEpisode, ...]:
    """What is told of each episode; one that forked is several trajectories, which share its reward."""
    episodes: list[list[Trajectory]] = []
    for trajectory in group.trajectories:
        if trajectory.continues:
            episodes[-1].append(trajectory)
        else:
            episodes.append([trajectory])
    return tuple(map(_told, episodes))


def _told(parts: list[Trajectory]) -> EvaluatedEpisode:
    versions = [version for version, _ in itertools.chain.from_iterable(part.version_runs() for part in parts)]
    return EvaluatedEpisode(
        reward=parts[0].reward,
        num_tokens=sum(part.num_sampled_tokens for part in parts),
        terminated=parts[-1].finish_reason is FinishReason.TERMINATED,
        oldest_version=min(versions),
        newest_version=max(versions),
    )
