"""TokenAges: how old tokens were when they were trained, and where they grew old: in flight, or in the queue."""

from collections import Counter

import numpy as np

from common.messages import GroupHeader
from common.staleness import token_staleness

MAX_AGE = 1 << 10  # what is older is counted as this old: a histogram does not grow for ever


class TokenAges:
    """Histograms over sampled tokens; age in policy versions -> number of tokens."""

    def __init__(self) -> None:
        self.staleness: Counter[int] = Counter()
        self.in_flight: Counter[int] = Counter()  # the part until the group was accepted
        self.in_queue: Counter[int] = Counter()  # the part from then on

    def add(self, header: GroupHeader, *, accepted_version: int, trained_version: int) -> None:
        """The group is delivered for the step that updates trained_version."""
        tokens: Counter[int] = Counter()  # by the version that sampled them: few, while there may be many runs
        for trajectory in header.trajectories:
            for version, length in trajectory.version_runs:
                tokens[version] += length
        waited = trained_version - accepted_version
        staleness_V = token_staleness(np.array(list(tokens)), current=trained_version)
        for staleness, num_tokens in zip(staleness_V.tolist(), tokens.values(), strict=True):
            self.staleness[_bounded(staleness)] += num_tokens
            self.in_flight[_bounded(staleness - waited)] += num_tokens
            self.in_queue[_bounded(waited)] += num_tokens


def _bounded(age: int) -> int:
    return max(0, min(age, MAX_AGE))
