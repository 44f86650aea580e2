"""Recorder: the calls of one session, joined by token prefix into growing lists of ids."""

import numpy as np

from common.trajectory import FinishReason, Trajectory
from rollout_server.inference import Completion
from rollout_server.token_log import TokenLog


class Recorder:
    """A call whose prompt begins with all ids of an earlier list goes on with that list; any other begins a new one.

    What a new list has in common with an older one is context there, and masked: each sampled token is trained once.
    """

    def __init__(self) -> None:
        self._logs: list[TokenLog] = []
        self.num_calls = 0

    def __repr__(self) -> str:
        return f"<Recorder {self.num_calls} calls in {len(self._logs)} lists>"

    def record(self, prompt_ids_T: np.ndarray, completion: Completion) -> None:
        """The policy has sampled the completion after prompt_ids_T [T] int32."""
        log = self._longest_prefix(prompt_ids_T)
        if log is None:
            log = TokenLog(prompt_ids_T)
            self._logs.append(log)
        else:
            log.append_given(prompt_ids_T[len(log) :])
        log.append_sampled(completion)
        self.num_calls += 1

    def _longest_prefix(self, prompt_ids_T: np.ndarray) -> TokenLog | None:
        candidates = (log for log in self._logs if len(log) <= prompt_ids_T.size)
        fitting = [log for log in candidates if np.array_equal(log.token_ids, prompt_ids_T[: len(log)])]
        return max(fitting, key=len, default=None)

    def trajectories(self, reward: float, finish_reason: FinishReason) -> list[Trajectory]:
        """The episode's reward belongs to each list of it: nothing is known of which part earned it."""
        return [
            log.trajectory(reward=reward, finish_reason=finish_reason, continues=number > 0)
            for number, log in enumerate(self._logs)
        ]
