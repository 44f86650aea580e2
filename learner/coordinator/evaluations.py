"""Evaluations: which server does which evaluation task, with which version, and when an evaluation is over.

Every token of an evaluation is sampled by one version, and generation never stops for it. How:

* While an evaluation of version v has not begun, all servers are asked to hold the first version from v on that they
  load. The first one that says so decides: what it holds is what is evaluated. The others hold that one too, or go on.
* A server that holds goes on generating. Only leases that demand a newer version wait there, and no token becomes older
  than its lease allows: a lease never begins before its min_version is loaded, held or not. A hold ends with the
  evaluation, or some seconds after a newer version was there (Welcome.evaluation_hold_s), whatever is unfinished.
* When no server holds the version any more before all tasks are done, everything done is dropped, and the evaluation
  begins anew with the next version that is held: a bounded number of times, and for a bounded time. Tasks of two
  versions are never mixed; an evaluation of some tasks only, which would be of the short ones, says that it is one.

Evaluation leases are no training leases: they have no deadline, no place in the queue, no bytes and no journal, and do
not count in pacing, depth or capacity when training leases are granted. They have low priority: they get only the room
that training leaves on a server, until a newer version is out (from then on the hold delays it) or they have waited
for patience_s. Then they are granted all the same, as far as half of the server's capacity: more than its capacity for
the time of an evaluation, which its engine queues.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.messages import EvaluatedEpisode
from common.snapshot import NO_VERSION
from learner.coordinator.decisions import Decision, GrantEvaluation, HoldFor, ReportEvaluation
from learner.coordinator.members import Member, Members
from learner.coordinator.settings import CoordinatorSettings

VERSION_GONE = "version_gone"
ANY_LATER = (1 << 31) - 1


@dataclass(slots=True, kw_only=True)
class _Evaluation:
    """The one that is under way. All times are seconds of the caller's clock."""

    asked_version: int
    asked_at: float
    version: int = NO_VERSION  # decided by the first server that holds one
    waiting_since: float = 0.0  # for room: since then nothing was granted
    begun: int = 0  # how often
    pending: deque[int] = field(default_factory=deque)  # tasks
    running: dict[int, tuple[int, str]] = field(default_factory=dict)  # evaluation id -> task, server
    results: dict[int, tuple[EvaluatedEpisode, ...]] = field(default_factory=dict)  # by task
    failures: Counter[int] = field(default_factory=Counter)  # of each task
    given_up: dict[int, str] = field(default_factory=dict)  # task -> kind of its last failure

    def begin(self, version: int, num_tasks: int, now: float) -> None:
        """With all tasks; nothing is running."""
        self.version, self.waiting_since = version, now
        self.begun += 1
        self.pending = deque(range(num_tasks))

    def drop(self) -> None:
        """What is done is of a version that is gone."""
        self.version = NO_VERSION
        self.results, self.given_up = {}, {}
        self.failures.clear()


class Evaluations:
    """One evaluation at a time; the learner asks for it, and a report ends it."""

    def __init__(self, settings: CoordinatorSettings, members: Members) -> None:
        self._settings = settings
        self._rules = settings.evaluation
        self._members = members
        self._now: _Evaluation | None = None
        self._next_id = 0

    @property
    def held_versions(self) -> tuple[int, int]:
        """First and last version that servers shall hold; an empty range when none."""
        if self._now is None:
            return 0, NO_VERSION
        version = self._now.version
        return (self._now.asked_version, ANY_LATER) if version == NO_VERSION else (version, version)

    def ask(self, version: int, now: float) -> list[Decision]:
        """The learner wants an evaluation of `version`. Asked again, it goes on; of another one, it begins anew."""
        if self._now is not None and self._now.asked_version == version:
            return []
        self._now = _Evaluation(asked_version=version, asked_at=now)
        return [self._hold()]

    def joined(self, server_id: str) -> list[Decision]:
        """The server is ready, perhaps not for the first time: it works on no evaluation task."""
        self.left(server_id)
        return [self._hold(server_id)] if self._now is not None else []

    def left(self, server_id: str) -> None:
        """The server is gone, or may not be used: others do what it had."""
        evaluation = self._now
        if evaluation is None:
            return
        for evaluation_id in [one for one, (_, server) in evaluation.running.items() if server == server_id]:
            evaluation.pending.appendleft(evaluation.running.pop(evaluation_id)[0])

    def finished(
        self, server_id: str, evaluation_id: int, *, task_id: int, version: int, episodes: Sequence[EvaluatedEpisode]
    ) -> str:
        """Takes the result, and returns why it cannot be taken, where only a wrong server does that.

        What comes too late is ignored.
        """
        evaluation = self._now
        if evaluation is None or evaluation.running.get(evaluation_id, (0, ""))[1] != server_id:
            return ""
        task = evaluation.running.pop(evaluation_id)[0]
        fault = self._fault(evaluation, task_id == task, version, episodes)
        if fault:
            self._count_failure(evaluation, task, "invalid")
            return f"evaluation task {task}: {fault}"
        evaluation.results[task] = tuple(episodes)
        return ""

    def failed(self, server_id: str, evaluation_id: int, kind: str) -> None:
        """The server could not do the task: it is tried again, a bounded number of times."""
        evaluation = self._now
        if evaluation is None or evaluation.running.get(evaluation_id, (0, ""))[1] != server_id:
            return
        task = evaluation.running.pop(evaluation_id)[0]
        if kind == VERSION_GONE:
            evaluation.pending.appendleft(task)
            self._members[server_id].holding = NO_VERSION
        else:
            self._count_failure(evaluation, task, kind)

    def go_on(self, published_version: int, now: float) -> list[Decision]:
        """What has become possible: a version to evaluate, tasks to grant, a report."""
        evaluation = self._now
        if evaluation is None or self._rules is None:
            return []
        if now - evaluation.asked_at >= self._rules.timeout_s:
            return self._end(f"it was not done within {self._rules.timeout_s:g} s")
        if len(evaluation.results) + len(evaluation.given_up) == self._rules.num_tasks:
            return self._end("")
        decisions: list[Decision] = []
        if evaluation.version != NO_VERSION and not evaluation.running and not self._holders(evaluation.version, now):
            if evaluation.begun >= self._rules.max_begun:
                return self._end(f"servers had newer versions before it was done, {evaluation.begun} times")
            evaluation.drop()
            decisions.append(self._hold())
        if evaluation.version == NO_VERSION:
            decisions += self._begin(evaluation, published_version, now)
        return [*decisions, *self._grant(evaluation, published_version, now)]

    def _begin(self, evaluation: _Evaluation, published_version: int, now: float) -> list[Decision]:
        """With what the first server holds, if one does."""
        assert self._rules is not None
        held = [
            member.holding for member in self._members.values()
            if evaluation.asked_version <= member.holding <= published_version and self._is_usable(member, now)
        ]  # fmt: skip
        if not held:
            return []
        evaluation.begin(min(held), self._rules.num_tasks, now)
        return [self._hold()]

    def _grant(self, evaluation: _Evaluation, published_version: int, now: float) -> list[Decision]:
        assert self._rules is not None
        if not evaluation.pending or evaluation.version == NO_VERSION:
            evaluation.waiting_since = now
            return []
        is_urgent = published_version > evaluation.version or now - evaluation.waiting_since >= self._rules.patience_s
        decisions: list[Decision] = []
        used = Counter(server for _, server in evaluation.running.values())
        free = self._holders(evaluation.version, now)
        while evaluation.pending:
            free = [member for member in free if self._fits(member, used[member.server_id] + 1, is_urgent=is_urgent)]
            if not free:
                return decisions
            member = min(free, key=lambda member: (used[member.server_id], member.joined))
            used[member.server_id] += 1
            decisions.append(self._grant_to(evaluation, member))
            evaluation.waiting_since = now
        return decisions

    def _grant_to(self, evaluation: _Evaluation, member: Member) -> GrantEvaluation:
        task, evaluation_id = evaluation.pending.popleft(), self._next_id
        self._next_id += 1
        evaluation.running[evaluation_id] = (task, member.server_id)
        return GrantEvaluation(
            server_id=member.server_id, evaluation_id=evaluation_id, task_id=task, version=evaluation.version
        )

    def is_running(self, server_id: str, evaluation_id: int) -> bool:
        """Whether the server was granted this, and has neither done it nor lost it."""
        return self._now is not None and self._now.running.get(evaluation_id, (0, ""))[1] == server_id

    def _fits(self, member: Member, tasks: int, *, is_urgent: bool) -> bool:
        """Whether so many evaluation tasks at once are not too much for the server."""
        assert self._rules is not None
        groups = math.ceil(tasks * self._rules.samples / self._rules.group_size)
        if tasks > 1 and groups > max(1, member.capacity_groups // 2):
            return False
        return is_urgent or groups <= member.room(self._settings)

    def _holders(self, version: int, now: float) -> list[Member]:
        """Servers that can work with this version now."""
        members = self._members.values()
        return [member for member in members if member.holding == version and self._is_usable(member, now)]

    def _is_usable(self, member: Member, now: float) -> bool:
        return not member.out_of_service and now - member.heard_at <= self._settings.notice_timeout_s

    def _fault(
        self, evaluation: _Evaluation, is_right_task: bool, version: int, episodes: Sequence[EvaluatedEpisode]
    ) -> str:
        """What is wrong with a result; empty when nothing is."""
        assert self._rules is not None
        if not is_right_task or version != evaluation.version:
            return f"a result of another task or version than {evaluation.version}"
        if len(episodes) != self._rules.samples:
            return f"{len(episodes)} episodes, {self._rules.samples} were granted"
        if any(not episode.oldest_version == episode.newest_version == version for episode in episodes):
            return f"tokens of other versions than {version}"
        return ""

    def _count_failure(self, evaluation: _Evaluation, task: int, kind: str) -> None:
        assert self._rules is not None
        evaluation.failures[task] += 1
        if evaluation.failures[task] >= self._rules.max_task_failures:
            evaluation.given_up[task] = kind
        else:
            evaluation.pending.append(task)

    def _end(self, reason: str) -> list[Decision]:
        evaluation, self._now = self._now, None
        assert evaluation is not None
        assert self._rules is not None
        unfinished = self._rules.num_tasks - len(evaluation.results) - len(evaluation.given_up)
        report = ReportEvaluation(
            asked_version=evaluation.asked_version,
            version=evaluation.version,
            results=evaluation.results,
            failed=dict(Counter(evaluation.given_up.values())),
            unfinished=unfinished,
            reason=reason,
        )
        return [report, self._hold()]

    def _hold(self, server_id: str = "") -> HoldFor:
        first, last = self.held_versions
        return HoldFor(first=first, last=last, server_id=server_id)

    def describe(self) -> str:
        """How far the evaluation that is under way is, for people; empty when there is none."""
        evaluation = self._now
        if evaluation is None or self._rules is None:
            return ""
        version = evaluation.version if evaluation.version != NO_VERSION else f"{evaluation.asked_version} or later"
        return (
            f"version {version}, {len(evaluation.results)}/{self._rules.num_tasks} tasks done, "
            f"{len(evaluation.running)} running"
        )

    def __repr__(self) -> str:
        return f"<Evaluations {self.describe() or 'none'}>"
