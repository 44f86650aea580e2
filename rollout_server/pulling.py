"""PullState: which chunks of a snapshot or a delta to ask for, and when again. Pure rules; time is given."""

from dataclasses import dataclass, field

from common.snapshot import NO_VERSION, Chunked

CHUNKS_IN_FLIGHT = 8
REPLY_TIMEOUT_S = 5.0
MAX_PATIENCE = 16  # times REPLY_TIMEOUT_S


@dataclass(kw_only=True)
class Asked:
    """A chunk that was asked for, as the how-manieth request."""

    first: int
    last: int


@dataclass(kw_only=True)
class PullState:
    """How far a pull has come.

    Chunks are asked for again when nothing at all arrives any more, and each time that happens the patience doubles:
    a link that is only slow must not be given more to carry. A chunk asked for before another that has arrived is
    lost, because answers come in the order of the requests.
    """

    manifest: Chunked
    version: int
    timeout_s: float = REPLY_TIMEOUT_S
    base_version: int = NO_VERSION
    heard_s: float
    missing: set[int] = field(init=False)
    in_flight: dict[int, Asked] = field(default_factory=dict)
    patience: int = 1
    num_asked: int = 0
    num_asked_again: int = 0
    num_bytes_received: int = 0

    def __post_init__(self) -> None:
        self.missing = set(range(self.manifest.num_chunks))
        self._next = 0
        self._again: list[int] = []

    @property
    def share_missing(self) -> float:
        return len(self.missing) / max(1, self.manifest.num_chunks)

    def next_requests(self, now_s: float) -> list[int]:
        """Chunks to ask for now: new ones up to the window, and those that seem to be lost."""
        if self.in_flight and now_s - self.heard_s > self.timeout_s * self.patience:
            self.patience = min(2 * self.patience, MAX_PATIENCE)
            self.heard_s = now_s
            self._again = sorted(self.in_flight)
        requests = self._take_again()
        while len(self.in_flight.keys() | set(requests)) < CHUNKS_IN_FLIGHT and self._next < self.manifest.num_chunks:
            requests.append(self._next)
            self._next += 1
        for index in requests:
            asked = self.in_flight.get(index)
            self.in_flight[index] = Asked(first=asked.first if asked else self.num_asked, last=self.num_asked)
            self.num_asked += 1
        return requests

    def _take_again(self) -> list[int]:
        again, self._again = [index for index in self._again if index in self.missing], []
        self.num_asked_again += len(again)
        return again

    def arrived(self, index: int, num_bytes: int, now_s: float) -> None:
        """Chunk `index` is there and verified."""
        self._heard(index, now_s)
        self.missing.discard(index)
        self.num_bytes_received += num_bytes

    def damaged(self, index: int, now_s: float) -> None:
        """What came as chunk `index` is not it, or that it will be there later."""
        self._heard(index, now_s)
        self._again.append(index)

    def ask_others(self, now_s: float) -> None:
        """Who was asked so far will be asked no more: what is in flight has to be asked for again."""
        self.heard_s, self.patience = now_s, 1
        self._again = sorted({*self._again, *self.in_flight})
        self.in_flight.clear()

    def _heard(self, index: int, now_s: float) -> None:
        self.heard_s = now_s
        asked = self.in_flight.pop(index, None)
        if asked is None:
            return
        lost = sorted(other for other, request in self.in_flight.items() if request.last < asked.first)
        self._again += [other for other in lost if other not in self._again]
