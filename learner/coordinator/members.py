"""Member: one rollout server as the rules see it. Capacity, signs of life, and how much it is trusted with."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from learner.coordinator.settings import CoordinatorSettings

PAUSE_S = 1.0  # after too many failures in a row, doubled with each further one
MAX_PAUSE_S = 30.0
MAX_DOWN_S = 10.0  # likewise, between two trials of an environment that is down
MAX_OFFENDERS = 1 << 12


@dataclass(slots=True, kw_only=True)
class EnvironmentDown:
    """An environment that a server could not reach."""

    reason: str
    failures_in_a_row: int = 0
    paused_until: float = 0.0  # then one lease at a time tries whether it is up again

    def note_failure(self, reason: str, now: float) -> None:
        self.reason = reason
        if now >= self.paused_until:  # what fails during a pause was granted before it
            self.paused_until = now + min(MAX_DOWN_S, PAUSE_S * 2.0 ** min(self.failures_in_a_row, 10))
            self.failures_in_a_row += 1


@dataclass(slots=True, kw_only=True)
class Member:
    """A server that is ready. All times are seconds of the caller's clock."""

    server_id: str
    joined: int  # order of joining
    capacity_groups: int
    capacity_bytes: int
    heard_at: float
    progressed_at: float  # when its work loop last got something done, or had nothing to do
    progress: int = 0
    loaded_version: int = -1
    holding: int = -1  # the version that it stays at for an evaluation, as it says itself
    leases: dict[int, int] = field(default_factory=dict)  # lease -> min_version, of its running leases
    failures_in_a_row: int = 0
    paused_until: float = 0.0
    last_failure: str = ""
    out_of_service: str = ""  # why it may not be granted anything, as it says itself
    down: dict[int, EnvironmentDown] = field(default_factory=dict)  # environments that are down, as seen from there

    def free_groups(self, settings: CoordinatorSettings, now: float) -> int:
        """Leases the server may be granted now. A server that only fails gets one at a time, after a pause."""
        if now - self.heard_at > settings.notice_timeout_s or self.out_of_service:
            return 0
        free = self.room(settings)
        if self.failures_in_a_row < settings.failures_before_pause:
            return free
        return min(free, 1) if now >= self.paused_until and not self.leases else 0

    def room(self, settings: CoordinatorSettings) -> int:
        """Leases it could hold beside those it has, were there nothing against it."""
        return min(self.capacity_groups, self.capacity_bytes // settings.max_group_bytes) - len(self.leases)

    def note_failure(self, reason: str, *, failures_before_pause: int, now: float) -> None:
        self.failures_in_a_row += 1
        self.last_failure = reason
        excess = self.failures_in_a_row - failures_before_pause
        # What fails during a pause was granted before it: it says nothing new, and does not prolong the pause.
        if excess >= 0 and now >= self.paused_until:
            self.paused_until = now + min(MAX_PAUSE_S, PAUSE_S * 2.0 ** min(excess, 10))

    def note_success(self) -> None:
        self.failures_in_a_row = 0
        self.paused_until = 0.0

    def note_down(self, environment: int, reason: str, now: float) -> None:
        """The server could not reach the environment: that says nothing about the server or the task."""
        self.down.setdefault(environment, EnvironmentDown(reason=reason)).note_failure(reason, now)

    def has_work(self, published_version: int) -> bool:
        """Whether it holds a lease that nothing but the server itself keeps from going on."""
        return any(min_version <= published_version for min_version in self.leases.values())

    def forgive(self, pause_s: float, now: float) -> None:
        """The last `pause_s` seconds do not count as silence."""
        self.heard_at = min(now, self.heard_at + pause_s)
        self.progressed_at = min(now, self.progressed_at + pause_s)

    def is_silent(self, settings: CoordinatorSettings, now: float) -> bool:
        return now - self.heard_at > settings.server_timeout_s

    def loss(self, settings: CoordinatorSettings, now: float) -> str:
        """Why the server counts as lost; empty while it does not."""
        if self.is_silent(settings, now):
            return f"not heard of for {now - self.heard_at:.0f} s"
        if now - self.progressed_at > settings.hang_timeout_s:
            return f"alive, but no progress on its {len(self.leases)} leases for {now - self.progressed_at:.0f} s"
        return ""


class OwnPauses:
    """Notices when the coordinator itself was stopped: the silence of others is then its own."""

    def __init__(self) -> None:
        self._last_tick_at: float | None = None

    def since_last_tick(self, settings: CoordinatorSettings, now: float) -> float:
        """Seconds that must not count as anybody's silence."""
        since_s = now - self._last_tick_at if self._last_tick_at is not None else 0.0
        self._last_tick_at = now
        return since_s if since_s > settings.server_timeout_s / 2 else 0.0


class HungServers:
    """Servers that were given up alive, and have finished nothing since."""

    def __init__(self) -> None:
        self._names: dict[str, None] = {}

    def __contains__(self, server_id: str) -> bool:
        return server_id in self._names

    def note(self, server_id: str) -> None:
        self._names = dict.fromkeys([*self._names, server_id][-MAX_OFFENDERS:])

    def forgive(self, server_id: str) -> None:
        self._names.pop(server_id, None)


class FreeMembers:
    """Servers to grant to at one moment: those without a recent failure first, then those with most free capacity."""

    def __init__(self, members: Iterable[Member], settings: CoordinatorSettings, now: float) -> None:
        self._settings = settings
        self._now = now
        self._heap = [place for member in members if (place := self._place(member)) is not None]
        heapify(self._heap)

    def __bool__(self) -> bool:
        return bool(self._heap)

    def take(self) -> Member:
        """To be granted one lease; then it is to be put back."""
        return heappop(self._heap)[-1]

    def put_back(self, member: Member) -> None:
        place = self._place(member)
        if place is not None:
            heappush(self._heap, place)

    def _place(self, member: Member) -> tuple[int, int, int, Member] | None:
        free = member.free_groups(self._settings, self._now)
        return (member.failures_in_a_row, -free, member.joined, member) if free > 0 else None


class Members(dict[str, Member]):
    """The servers of a run, by id."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        super().__init__()
        self._settings = settings
        # Those that may have room: most servers are full most of the time, and only the end of a lease changes that.
        self._roomy: dict[str, Member] = {}

    def add(self, member: Member) -> None:
        """A server joins, or a member has another capacity now."""
        self[member.server_id] = self._roomy[member.server_id] = member

    def remove(self, member: Member) -> None:
        """Its leases must have ended."""
        del self[member.server_id]
        self._roomy.pop(member.server_id, None)

    def end_lease(self, server_id: str, lease_id: int) -> None:
        member = self._roomy[server_id] = self[server_id]
        del member.leases[lease_id]

    def free(self, now: float) -> FreeMembers:
        """Servers that leases may be granted to now."""
        for server_id in [one for one, member in self._roomy.items() if member.room(self._settings) <= 0]:
            del self._roomy[server_id]
        return FreeMembers(self._roomy.values(), self._settings, now)


class Offences:
    """Counts what no correct server sends, by peer; a good group clears the peer's count."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._counts: dict[str, int] = {}

    def note(self, server_id: str) -> bool:
        """True: the limit is reached."""
        offences = self._counts.pop(server_id, 0) + 1
        self._counts[server_id] = offences
        if len(self._counts) > MAX_OFFENDERS:  # identities are cheap to invent: forget the oldest
            del self._counts[next(iter(self._counts))]
        return offences >= self.limit

    def clear(self, server_id: str) -> None:
        self._counts.pop(server_id, None)
