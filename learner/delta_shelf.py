"""DeltaShelf: the deltas between the versions published last, and why a server pulls everything instead. Pure rules.

Each delta leads from one published version to the next. They are kept as a chain that ends at the newest version, so
that a server a few versions behind still pulls little; the chain is cut where a delta does not pay.
"""

from collections import Counter
from dataclasses import dataclass

from common.delta import DeltaManifest
from common.snapshot import NO_VERSION, SnapshotManifest
from common.weight_messages import WhyFull

MAX_CHAIN_SHARE = 0.5  # of the full snapshot's bytes: whoever is farther behind pulls the full one


@dataclass(frozen=True, slots=True, eq=False)
class Delta:
    manifest: DeltaManifest
    data: bytes


class DeltaShelf:
    """Holds at most MAX_CHAIN_SHARE of the bytes of a full snapshot."""

    def __init__(self) -> None:
        self._deltas: dict[int, Delta] = {}  # by base version, the oldest first
        self._held_bytes = 0
        self._unpaid_base = NO_VERSION  # the version from which a delta to the newest does not pay
        self.full_pulls: Counter[WhyFull] = Counter()

    def __repr__(self) -> str:
        return f"<DeltaShelf from {list(self._deltas)}, {self._held_bytes} bytes>"

    def put(self, base: SnapshotManifest | None, target: SnapshotManifest, delta: Delta | None) -> None:
        """`target` is published after `base`; delta is None where it does not pay or there is no base."""
        if delta is None:
            self._deltas.clear()
            self._held_bytes = 0
            self._unpaid_base = base.version if base is not None else NO_VERSION
            return
        self._deltas[delta.manifest.base_version] = delta
        self._held_bytes += len(delta.data)
        while self._held_bytes > MAX_CHAIN_SHARE * target.num_bytes:
            oldest = next(iter(self._deltas))
            self._held_bytes -= len(self._deltas.pop(oldest).data)

    def after(self, held_version: int) -> Delta | WhyFull:
        """The delta that a server with the bytes of held_version goes on with, or why it must pull everything."""
        why: WhyFull = "no base"
        if (delta := self._deltas.get(held_version)) is not None:
            return delta
        if held_version != NO_VERSION:
            why = "a delta does not pay" if held_version == self._unpaid_base else "base is gone"
        self.full_pulls[why] += 1
        return why

    def chunk(self, base_version: int, version: int, index: int) -> memoryview | None:
        """Chunk `index` of the delta; None when it is gone or has no such chunk."""
        delta = self._deltas.get(base_version)
        if delta is None or delta.manifest.version != version or not 0 <= index < delta.manifest.num_chunks:
            return None
        start, end = delta.manifest.chunk_range(index)
        return memoryview(delta.data)[start:end]
