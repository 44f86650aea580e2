"""SnapshotShelf: which snapshot versions are kept, and when the slot of an old one may be written again. Pure rules."""

from dataclasses import dataclass, field

from common.snapshot import NO_VERSION, SnapshotManifest


@dataclass(kw_only=True)
class Pull:
    """One server's progress through one snapshot."""

    missing: set[int]  # chunk indexes not yet sent to it
    last_request_s: float


@dataclass(kw_only=True)
class ShelvedSnapshot:
    manifest: SnapshotManifest
    slot: int
    pulls: dict[bytes, Pull] = field(default_factory=dict)  # by peer

    def is_wanted(self, now_s: float, patience_s: float) -> bool:
        """Some server is in the middle of pulling it and was heard of within `patience_s`."""
        return any(pull.missing and now_s - pull.last_request_s < patience_s for pull in self.pulls.values())


class SnapshotShelf:
    """Keeps the newest snapshot always, and an older one only while a server is pulling it.

    A dead or very slow server holds a slot for `patience_s` at most: it then finds the version gone and starts on the
    newest one.
    """

    def __init__(self, *, patience_s: float = 5.0) -> None:
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
            pull = Pull(missing=set(range(snapshot.manifest.num_chunks)), last_request_s=now_s)
            snapshot.pulls[peer] = pull
        pull.missing.discard(index)
        pull.last_request_s = now_s
        return snapshot.slot

    def manifest(self, version: int) -> SnapshotManifest:
        return self._snapshots[version].manifest

    def release(self, now_s: float) -> list[int]:
        """Forget the older versions nobody is pulling; returns their slots."""
        old = [version for version in self._snapshots if version != self.newest_version]
        gone = [version for version in old if not self._snapshots[version].is_wanted(now_s, self._patience_s)]
        return [self._snapshots.pop(version).slot for version in gone]
