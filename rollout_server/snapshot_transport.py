"""SnapshotTransport: how versions get here; what each way is told, and what it hands over.

There is one over ZeroMQ, from any host, and one through shared memory, on the learner's own. A collective backend of
the engine itself (vLLM's `nccl`, see docs/weights.md) would be a third.
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.snapshot import NO_VERSION, SnapshotError, SnapshotManifest
from common.wire import Dealer
from rollout_server.local_changes import LocalChanges


@dataclass(slots=True, kw_only=True)
class WeightTarget:
    """Where the engine is and where it may go. It moves while a transport is at work."""

    run_id: str = ""
    loaded_version: int = NO_VERSION
    published_version: int = NO_VERSION
    base_model: bytes = b""  # content digest of the one that the engine holds; empty: none that it would trust

    def check(self, manifest: SnapshotManifest) -> None:
        """Raises SnapshotError for what must never be loaded."""
        if manifest.run_id != self.run_id:
            raise SnapshotError(f"snapshot {manifest.version} is of run {manifest.run_id}, not of {self.run_id}")
        if manifest.version <= self.loaded_version:
            raise SnapshotError(f"asked for a version after {self.loaded_version}, was given {manifest.version}")
        if manifest.adapter is not None and manifest.adapter.base_model != self.base_model:
            held = self.base_model.hex() or "none"
            wanted = manifest.adapter.base_model.hex()
            raise SnapshotError(
                f"snapshot {manifest.version} is an adapter of base model {wanted}, the engine holds {held}"
            )
        if manifest.version > self.published_version:  # the coordinator would not believe in tokens sampled with it
            raise SnapshotError(f"snapshot {manifest.version} is not announced yet, {self.published_version} is")

    def check_base_model(self, manifest: SnapshotManifest) -> None:
        """Likewise, of what was given as the base model of adapters."""
        if not manifest.is_base_model:
            raise SnapshotError(f"snapshot {manifest.version} was given as a base model")
        if manifest.run_id != self.run_id:
            raise SnapshotError(f"{manifest.title} is of run {manifest.run_id}, not of {self.run_id}")
        if manifest.content_digest == self.base_model:
            raise SnapshotError(f"{manifest.title} was given once more: the engine holds it")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivedSnapshot:
    """A version whose bytes lie whole and verified at `path`, and what it took to get them there."""

    manifest: SnapshotManifest
    path: Path
    form: str  # for people: a delta, or why it was not one
    num_bytes: int  # that travelled
    changes: LocalChanges | None = None


class SnapshotTransport(Protocol):
    """One at a time is asked for; nothing that comes over the wire makes it raise."""

    def next_version(self, dealer: Dealer) -> AbstractAsyncContextManager[ArrivedSnapshot | None]:
        """A version that the target admits, whose bytes stay as they are inside; None when there was none to get."""
        ...

    def forget(self) -> None:
        """What is held here is not to be built upon: the next version comes whole."""
        ...

    def close(self) -> None: ...
