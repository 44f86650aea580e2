"""InPlaceChanges: prepares what a delta changed for the engine's own parameters, before the engine pauses.

The engine then only writes values to places that it is given. Which those are it has told once, after a whole
snapshot: see CopyRecorder.
"""

import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.snapshot import ITEM_BYTES, SnapshotManifest
from rollout_server.inference import LocalSnapshot
from rollout_server.local_changes import I64, LocalChanges, Words
from rollout_server.placements import Placement

logger = logging.getLogger(__name__)

MAX_SHARE_IN_PLACE = 0.1  # of the elements; from there on copying all of them is quicker: make bench-apply

Part = tuple[str, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """What one rank of the engine has to write. A file holds num_items int64 indices, then as many values."""

    rank: int
    path: Path
    num_items: int
    parts: tuple[Part, ...]  # (parameter, start, count): items [start, start + count) belong to this flat parameter


class InPlaceChanges:
    """Remembers where each rank keeps which element, and writes patches. One update at a time."""

    def __init__(self) -> None:
        self._placements: dict[int, dict[str, list[Placement]]] = {}  # by rank, by the snapshot's tensor
        self._descriptors: dict[int, int] = {}
        self._has_learnt = False
        self._has_said_that_much_changed = False

    def __repr__(self) -> str:
        return f"<InPlaceChanges on {len(self._placements)} ranks>"

    def learn(self, answers: Sequence[tuple[int, Sequence[Sequence[Any]], str]]) -> None:
        """Each rank's (rank, fields of its Placements, why those are not known) after it loaded a whole snapshot."""
        if self._has_learnt:
            return
        self._has_learnt = True
        for rank, _, complaint in answers:
            if complaint:
                logger.warning("every weight update copies the whole snapshot: on rank %d, %s", rank, complaint)
                return
        for rank, fields, _ in answers:
            by_tensor = self._placements[rank] = defaultdict(list)
            for tensor, parameter, start, sizes, strides, destination in fields:
                placement = Placement(tensor, parameter, start, tuple(sizes), tuple(strides), destination)
                by_tensor[tensor].append(placement)

    def prepare(self, snapshot: LocalSnapshot, loaded_version: int) -> list[Patch] | None:
        """For an engine that is at loaded_version; None where it has to copy the whole snapshot."""
        changes = snapshot.changes
        if changes is None or changes.base_version != loaded_version or not self._placements:
            return None
        if self._changed_much(snapshot.manifest, changes):
            return None
        changed = list(changes.read(snapshot.manifest))
        return [self._write_patch(rank, changed) for rank in self._placements]

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _changed_much(self, manifest: SnapshotManifest, changes: LocalChanges) -> bool:
        share = changes.num_changed / sum(tensor.num_bytes // ITEM_BYTES[tensor.dtype] for tensor in manifest.tensors)
        if share <= MAX_SHARE_IN_PLACE:
            return False
        if not self._has_said_that_much_changed:
            self._has_said_that_much_changed = True
            logger.info(
                "version %d changed %.0f %% of the elements: more than %.0f %% and all are copied, which is quicker",
                *(manifest.version, share * 100, MAX_SHARE_IN_PLACE * 100),
            )
        return True

    def _write_patch(self, rank: int, changed: Sequence[tuple[str, I64, Words]]) -> Patch:
        parts: list[Part] = []
        indices: list[I64] = []
        values: list[Words] = []
        end = 0
        for name, positions, words in changed:
            for placement in self._placements[rank][name]:
                which, places = placement.place(positions)
                if places.size:
                    parts.append((placement.parameter, end, places.size))
                    indices.append(places)
                    values.append(words[which])
                    end += places.size
        if rank not in self._descriptors:
            self._descriptors[rank] = os.memfd_create(f"countercurrent-patch-{rank}")
        descriptor = self._descriptors[rank]
        path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        with path.open("r+b") as file:  # pages that are there are written again: new ones take longer than that
            for array in (*indices, *values):
                file.write(array.data)
            file.truncate()
        return Patch(rank=rank, path=path, num_items=end, parts=tuple(parts))
