"""TokenAges: how old tokens were when they were trained, and where they grew old: in flight, or in the queue."""

from collections import Counter
from collections.abc import Iterable

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

    def add(self, groups: Iterable[tuple[GroupHeader, int]], *, trained_version: int) -> None:
        """Groups, and the versions they were accepted at, are delivered for the step that updates trained_version."""
        tokens: Counter[tuple[int, int]] = Counter()  # by sampled and accepted version: few, while runs may be many
        for header, accepted_version in groups:
            for trajectory in header.trajectories:
                for version, length in trajectory.version_runs:
                    tokens[version, accepted_version] += length
        staleness_V = token_staleness(np.array([version for version, _ in tokens]), current=trained_version)
        for staleness, ((_, accepted_version), num_tokens) in zip(staleness_V.tolist(), tokens.items(), strict=True):
            waited = trained_version - accepted_version
            self.staleness[_bounded(staleness)] += num_tokens
            self.in_flight[_bounded(staleness - waited)] += num_tokens
            self.in_queue[_bounded(waited)] += num_tokens


def _bounded(age: int) -> int:
    return max(0, min(age, MAX_AGE))
