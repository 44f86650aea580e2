"""VersionHold: which version this server stays at, for a while, because it is being evaluated."""

from common.snapshot import NO_VERSION


class VersionHold:
    """A range of versions that the learner wants held, and the one that was held for as long as may be."""

    def __init__(self) -> None:
        self._first, self._last = 0, NO_VERSION  # an empty range
        self._ran_out = NO_VERSION

    def set(self, first: int, last: int) -> None:
        """From now on the versions first to last are to be held; none when the range is empty."""
        self._first, self._last = first, last

    def run_out(self, version: int) -> None:
        """It was held long enough: from now on it is not, whatever the learner wants."""
        self._ran_out = version

    def clear(self) -> None:
        """Versions mean something else now."""
        self._first, self._last, self._ran_out = 0, NO_VERSION, NO_VERSION

    def holds(self, version: int) -> bool:
        return version != NO_VERSION and self._first <= version <= self._last and version != self._ran_out

    def __repr__(self) -> str:
        return f"<VersionHold {self._first} to {self._last}, {self._ran_out} ran out>"
