"""Depth: how many leases may be open at once. As few as keep the learner busy: every further one makes data older."""

from collections import deque

IDLE_TOLERANCE = 0.02  # of a cycle: the learner counts as busy when it waits for less
WINDOW_STEPS = 4  # of no waiting, before the depth shrinks


class Depth:
    """Follows the learner: deeper at once when it waits for lack of data, shallower when groups lie about unneeded.

    The bound of pacing is the ceiling, and where it starts: what is deep enough shows only in the steps to come.
    """

    def __init__(self, *, groups_per_step: int, ceiling: int) -> None:
        self._groups_per_step = groups_per_step
        self._ceiling = ceiling
        self._margin = max(1, groups_per_step // 8)  # spare groups that are kept for safety
        self._spares: deque[int] = deque(maxlen=WINDOW_STEPS)
        self.leases = ceiling

    def batch_delivered(self, *, idle_share: float, spare: int) -> None:
        """A batch went out, leaving `spare` finished groups; the learner had waited `idle_share` of the cycle for it.

        A learner that waited although there was enough waited for one slow group: more leases would not have helped.
        """
        if idle_share > IDLE_TOLERANCE:
            self._spares.clear()
            if spare <= self._margin:
                self.leases = min(self._ceiling, self.leases + max(1, self._groups_per_step // 4))
            return
        self._spares.append(spare)
        if len(self._spares) == WINDOW_STEPS and min(self._spares) > self._margin:
            surplus = min(self._spares) - self._margin
            self.leases = max(self._groups_per_step, self.leases - (surplus + 1) // 2)
            self._spares.clear()

    def __repr__(self) -> str:
        return f"<Depth {self.leases} of at most {self._ceiling} leases>"
