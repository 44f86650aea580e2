"""Evaluations: of one version alone, complete or said not to be, never trained, and over in bounded time."""

import math
from collections import Counter

from tests.simulation import history as seen
from tests.simulation.account import Account
from tests.simulation.check import Check
from tests.simulation.check_leases import PAUSE_SLACK_S

LATE_S = 8.0  # a second beyond the longest pauses of coordinator and learner, in which nobody looks at the clock


class Evaluations(Check):
    """From what is asked for to what is reported."""

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._asked_at: tuple[int, float] | None = None  # version, time; None: none is under way
        self._samples: dict[int, seen.EvaluationSampled] = {}  # by nonce
        self._reported: set[int] = set()  # nonces
        self._running: dict[tuple[str, int], int] = {}  # (server, task) -> evaluation, of this version and life
        self._capacity: dict[str, int] = {}
        self._version = -1

    def on_learner_started(self, event: seen.LearnerStarted) -> None:
        del event
        self._asked_at = None
        self._running.clear()

    def on_coordinator_opened(self, event: seen.CoordinatorOpened) -> None:
        self._running.clear()
        if self._asked_at is not None:
            self._asked_at = (self._asked_at[0], event.now)

    def on_joined(self, event: seen.Joined) -> None:
        self._capacity[event.server] = event.capacity_groups
        self._forget(event.server)

    def on_dropped(self, event: seen.Dropped) -> None:
        self._forget(event.server)

    def on_quarantined(self, event: seen.Quarantined) -> None:
        self._forget(event.server)

    def on_evaluation_asked(self, event: seen.EvaluationAsked) -> None:
        self._asked_at = (event.version, event.now)

    def on_evaluation_granted(self, event: seen.EvaluationGranted) -> None:
        rules = self.rules.evaluation
        self.demand(rules is not None and self._asked_at is not None, event, "an evaluation is asked for")
        if event.version != self._version:
            self._running.clear()
            self._version = event.version
        self.demand(event.version >= self._asked_at[0], event, "what is evaluated is no older than what is asked for")
        self.demand(event.version <= self.account.published, event, "what is evaluated is published")
        is_heard = event.silent_s <= self.rules.notice_timeout_s + PAUSE_SLACK_S
        self.demand(is_heard, event, "only servers that are heard of evaluate")
        self.demand(event.server not in self.account.life.quarantined, event, "the quarantined are granted nothing")
        held = Counter(server for server, _ in self._running)[event.server] + 1
        groups = math.ceil(held * rules.samples / rules.group_size)
        most = max(1, self._capacity[event.server] // 2)
        self.demand(held == 1 or groups <= most, event, "an evaluation takes half of a server at most", held)
        elsewhere = [server for server, task in self._running if task == event.task]
        self.demand(not elsewhere, event, "an evaluation task is done at one place at a time", elsewhere)
        self._running[event.server, event.task] = event.evaluation

    def on_evaluation_sampled(self, event: seen.EvaluationSampled) -> None:
        self._samples[event.nonce] = event

    def on_evaluation_heard(self, event: seen.EvaluationHeard) -> None:
        for place, running in list(self._running.items()):
            if (place[0], running) == (event.server, event.evaluation):
                del self._running[place]

    def on_evaluation_reported(self, event: seen.EvaluationReported) -> None:
        rules, asked = self.rules.evaluation, self._asked_at
        self.demand(asked is not None and asked[0] == event.asked_version, event, "what was asked for is reported")
        self._asked_at = None
        self._running.clear()
        number = len(set(event.tasks)) + event.num_failed + event.num_unfinished
        self.demand(number == rules.num_tasks, event, "every task is done, failed or unfinished", number)
        self.demand(len(set(event.tasks)) == len(event.tasks), event, "no task is reported twice")
        for nonce in event.nonces:
            sample = self._samples[nonce]
            is_pure = sample.oldest == sample.newest == event.version
            honest = self.account.honest[sample.epoch]
            self.demand(is_pure or not honest, event, "every token is of the version that is reported", sample)
            self.demand(nonce not in self._reported, event, "what is reported is sampled for that report", sample)
        self._reported.update(event.nonces)

    def on_committed(self, event: seen.Committed) -> None:
        journaled = self._samples.keys() & set(event.nonces)
        self.demand(not journaled, event, "nothing of an evaluation is journaled", journaled)

    def on_trained(self, event: seen.Trained) -> None:
        trained = self._samples.keys() & set(event.nonces)
        self.demand(not trained, event, "nothing of an evaluation is trained", trained)

    def on_ended(self, event: seen.Ended) -> None:
        if self._asked_at is not None and event.is_finished:
            waited_s = event.now - self._asked_at[1]
            most = self.rules.evaluation.timeout_s + LATE_S
            self.demand(waited_s <= most, event, "an evaluation is over in time, done or not", waited_s)

    def _forget(self, server: str) -> None:
        for place in [place for place in self._running if place[0] == server]:
            del self._running[place]
