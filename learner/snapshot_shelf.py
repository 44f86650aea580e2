"""SnapshotShelf: which snapshot versions are kept, and when the slot of an old one may be written again. Pure rules."""

from dataclasses import dataclass, field

from common.snapshot import NO_VERSION, SnapshotManifest


@dataclass(kw_only=True)
class Pull:
    """One server's progress through one snapshot."""

    missing: set[int]  # chunk indexes not yet sent to it
    began_s: float
    last_request_s: float
    num_sent: int = 0

    def is_going_on(self, now_s: float, patience_s: float) -> bool:
        return bool(self.missing) and now_s - self.last_request_s < patience_s

    def left_s(self, now_s: float) -> float:
        """What it still takes at its pace."""
        return len(self.missing) * max(now_s - self.began_s, 1e-3) / max(self.num_sent, 1)


@dataclass(kw_only=True)
class ShelvedSnapshot:
    manifest: SnapshotManifest
    slot: int
    pulls: dict[bytes, Pull] = field(default_factory=dict)  # by peer

    def left_s(self, now_s: float, patience_s: float) -> float | None:
        """Until the first of its servers has it; None when none is in the middle of pulling it."""
        going_on = [pull for pull in self.pulls.values() if pull.is_going_on(now_s, patience_s)]
        return min((pull.left_s(now_s) for pull in going_on), default=None)


class SnapshotShelf:
    """Keeps the newest snapshot always, and older ones only while a server is pulling them.

    At most `max_old` of these, so that there is always a slot for the next version: of more, those are kept that a
    server will have soonest. Whoever pulls another finds it gone and starts on the newest. So a dead server holds a
    slot for `patience_s` at most, and a slow one only while nobody else needs it.
    """

    def __init__(self, *, max_old: int = 1, patience_s: float = 5.0) -> None:
        self._max_old = max_old
        self._patience_s = patience_s
        self._snapshots: dict[int, ShelvedSnapshot] = {}

    def __repr__(self) -> str:
        pulls = sum(len(s.pulls) for s in self._snapshots.values())
        return f"<SnapshotShelf newest {self.newest_version}, keeps {sorted(self._snapshots)}, {pulls} pulls seen>"

    @property
    def newest_version(self) -> int:
        return max(self._snapshots, default=NO_VERSION)

    def newest(self) -> SnapshotManifest:
        """Raises KeyError when nothing was published yet."""
        return self._snapshots[self.newest_version].manifest

    @property
    def newest_slot(self) -> int:
        """Raises KeyError when nothing was published yet."""
        return self._snapshots[self.newest_version].slot

    def put(self, manifest: SnapshotManifest, slot: int) -> None:
        if manifest.version <= self.newest_version:
            raise ValueError(f"version {manifest.version} is not newer than {self.newest_version}; versions only grow")
        self._snapshots[manifest.version] = ShelvedSnapshot(manifest=manifest, slot=slot)

    def request_chunk(self, peer: bytes, version: int, index: int, now_s: float) -> int | None:
        """Slot that holds chunk `index` of `version`, or None when the version is gone or has no such chunk."""
        snapshot = self._snapshots.get(version)
        if snapshot is None or not 0 <= index < snapshot.manifest.num_chunks:
            return None
        pull = snapshot.pulls.get(peer)
        if pull is None:
            pull = Pull(missing=set(range(snapshot.manifest.num_chunks)), began_s=now_s, last_request_s=now_s)
            snapshot.pulls[peer] = pull
        pull.num_sent += index in pull.missing
        pull.missing.discard(index)
        pull.last_request_s = now_s
        return snapshot.slot

    def manifest(self, version: int) -> SnapshotManifest:
        return self._snapshots[version].manifest

    def release(self, now_s: float) -> list[int]:
        """Forget the older versions that are not to be kept; returns their slots."""
        old = [version for version in self._snapshots if version != self.newest_version]
        left = {version: self._snapshots[version].left_s(now_s, self._patience_s) for version in old}
        wanted = sorted((left_s, version) for version, left_s in left.items() if left_s is not None)
        kept = {version for _, version in wanted[: self._max_old]}
        return [self._snapshots.pop(version).slot for version in old if version not in kept]
