"""Deadlines: which open leases must be trained by which step, so that none of their tokens grows too old.

Why no token older than K = max_staleness versions is trained. Let G = groups_per_step, v the policy version.

* A lease's deadline is the last version that may be updated with its group: min_version + K, where no token of it may
  be sampled by a policy older than min_version; once the group is there, the version of its oldest token + K.
* A lease is granted with min_version >= (v * G + open leases) // G - K. So for every step s >= v at most
  (s + 1 - v) * G open leases are due by s: as many as can be trained until then.
* A batch is the G finished groups with the earliest deadlines. It waits while, without the running leases, that sum
  would not hold any more after it: so it goes on holding, and in particular nothing is ever overdue.
* Pacing, open leases < (K + 1) * G, says min_version <= v: what a server has to wait for exists, or is being
  published. Its own group is never needed for it, so nothing waits in a circle.

With the stale action "requeue" a running lease that a batch would wait for is given up, and its task leased again, a
bounded number of times. With "mask" the batch does not wait, and tokens that are too old by the time their group is
trained get no gradient: the learner masks them, whatever happened here.
"""

from collections import Counter
from collections.abc import Mapping


class Deadlines:
    """Counts open leases by deadline: the last policy version that may be updated with their groups.

    With G groups trained per step, everything is trained in time as long as, at version v and for every step s >= v,
    at most (s + 1 - v) * G open leases are due by s: the condition under which serving the earliest deadline first
    misses none.
    """

    def __init__(self, groups_per_step: int) -> None:
        self._groups_per_step = groups_per_step
        self._due: Counter[int] = Counter()

    def add(self, deadline: int) -> None:
        self._due[deadline] += 1

    def remove(self, deadline: int) -> None:
        self._due[deadline] -= 1
        if not self._due[deadline]:
            del self._due[deadline]

    def first_overfull(self, version: int, *, trained: Mapping[int, int]) -> int | None:
        """The first step by which more is due than can be trained, were the run at `version`.

        trained: by deadline, how many leases are trained by then. None: everything can be trained in time.
        """
        left = self._due.copy()
        left.subtract(trained)
        total = 0
        for deadline in sorted(left):
            total += left[deadline]
            if total > max(0, deadline + 1 - version) * self._groups_per_step:
                return deadline
        return None

    def __repr__(self) -> str:
        due = ", ".join(f"{count} by step {deadline}" for deadline, count in sorted(self._due.items()))
        return f"<Deadlines {due or 'none'}>"
