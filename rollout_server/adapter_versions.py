"""AdapterVersions: which versions of an adapter an engine holds, and which of them are still needed. Pure rules.

New requests are sampled by the newest version, and each request ends on the one that it began with.
"""

from dataclasses import dataclass, field

from common.snapshot import NO_VERSION


@dataclass(eq=False, kw_only=True)
class HeldAdapter:
    """One adapter in the engine, under a number that no other ever has: versions of two lives of a run may be equal."""

    number: int  # from 1
    version: int
    path: str
    num_requests: int = field(default=0)  # that it samples at the moment

    @property
    def name(self) -> str:
        return f"version {self.version}, load {self.number}"


class AdapterVersions:
    """At most `capacity` of them, the newest included."""

    def __init__(self, capacity: int) -> None:
        if capacity < 2:
            raise ValueError(f"an engine holds at least 2 adapters, one that is used and the next; got {capacity}")
        self.capacity = capacity
        self.newest: HeldAdapter | None = None
        self._held: list[HeldAdapter] = []
        self._num_loads = 0

    def __repr__(self) -> str:
        held = ", ".join(f"{each.version} by {each.num_requests}" for each in self._held)
        return f"<AdapterVersions up to {self.capacity}: {held or 'none'}>"

    @property
    def num_requests(self) -> int:
        return sum(each.num_requests for each in self._held)

    @property
    def has_room(self) -> bool:
        """For one more, once those that nobody needs are removed."""
        return len(self._held) - len(self.unneeded()) < self.capacity

    def unneeded(self) -> list[HeldAdapter]:
        """Older than the newest, and no request began with them that has not ended."""
        return [each for each in self._held if each is not self.newest and not each.num_requests]

    def begin_load(self, version: int, path: str) -> HeldAdapter:
        """From now on it takes a place, whether the load succeeds or not. Raises OverflowError without room."""
        if len(self._held) >= self.capacity:
            raise OverflowError(f"no room for version {version} in {self!r}; remove what is not needed first")
        self._num_loads += 1
        self._held.append(HeldAdapter(number=self._num_loads, version=version, path=path))
        return self._held[-1]

    def loaded(self, adapter: HeldAdapter) -> None:
        """New requests are its own."""
        self.newest = adapter

    def removed(self, adapters: list[HeldAdapter]) -> None:
        self._held = [each for each in self._held if each not in adapters]

    def retire(self) -> None:
        """None is the newest any more: all are unneeded once their requests have ended."""
        self.newest = None

    def oldest_in_use(self) -> int:
        """Its version; NO_VERSION when no request runs."""
        return min((each.version for each in self._held if each.num_requests), default=NO_VERSION)
