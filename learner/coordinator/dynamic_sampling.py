"""Dynamic sampling: groups that teach nothing are filtered, and other tasks are sampled in their place.

A group whose rewards are all equal has no advantage relative to the group, and so no gradient (DAPO, Yu et al. 2025,
arXiv:2503.14476, section 3.2). A filtered group is as done as a trained one: its task is not leased again, whatever is
killed, for the journal says so before its server may forget it. Were there no end to filtering, a policy that solves
everything, or nothing, would never make a step again: so for each step at most max_filtered groups are.
"""

from collections.abc import Mapping

from common.messages import GroupHeader

EQUAL_REWARDS = "equal_rewards"  # why a lease of a filtered group counts as cancelled


def has_equal_rewards(header: GroupHeader) -> bool:
    """Whether all trajectories of the group have the same reward; those of one episode have that anyway."""
    first = header.trajectories[0].reward
    return all(trajectory.reward == first for trajectory in header.trajectories)


def first_remembered(version: int) -> int:
    """Of a checkpoint at `version`: the first version whose filtered tasks are open in it, and stay in the journal.

    What was filtered while the step before was under way may not be in the journal yet when the checkpoint is taken.
    What was filtered before that is: it came into the journal before the batch of that step.
    """
    return version - 1


class DynamicSampling:
    """Which groups are filtered, and what was filtered lately. max_filtered: for one optimizer step; 0: none ever."""

    def __init__(self, max_filtered: int, filtered: Mapping[int, int], *, version: int) -> None:
        """`filtered`: task -> version for whose step its group was filtered before a restart at `version`."""
        self.max_filtered = max_filtered
        self._version_of = dict(filtered)  # by task
        self.reached(version)

    def filters(self, header: GroupHeader, *, version: int) -> bool:
        """Whether the group is to be filtered, in a run that is at `version`."""
        if not self.max_filtered or not has_equal_rewards(header):
            return False
        return self._num_filtered(version) < self.max_filtered

    def note_filtered(self, task_id: int, *, version: int) -> None:
        self._version_of[task_id] = version

    def reached(self, version: int) -> None:
        """The run is at `version`: the next checkpoint is of no earlier one."""
        first = first_remembered(version)
        self._version_of = {task_id: each for task_id, each in self._version_of.items() if each >= first}

    def task_ids(self) -> tuple[int, ...]:
        """Tasks of which a checkpoint that is taken now cannot say that they are done: the journal says so."""
        return tuple(self._version_of)

    def describe(self, version: int) -> str:
        """For people; empty when nothing was filtered for this step yet."""
        number = self._num_filtered(version)
        return f"{number} of at most {self.max_filtered} groups filtered for equal rewards" if number else ""

    def _num_filtered(self, version: int) -> int:
        return sum(each == version for each in self._version_of.values())
