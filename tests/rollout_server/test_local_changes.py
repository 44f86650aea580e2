"""What is different in a version, in a file."""

from pathlib import Path

import numpy as np

from common.snapshot import SnapshotManifest, TensorSpec, build_manifest
from rollout_server.in_place_changes import InPlaceChanges
from rollout_server.inference import LocalSnapshot
from rollout_server.local_changes import LocalChanges


def a_manifest() -> SnapshotManifest:
    tensors = (
        TensorSpec("a", (6,), "float32", 0),
        TensorSpec("b", (4,), "bfloat16", 24),
        TensorSpec("c", (3,), "float32", 32),
    )
    return build_manifest(memoryview(bytes(44)), tensors, run_id="test", version=7)


def positions(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_what_is_written_is_read_tensor_by_tensor_whatever_their_types_and_in_however_many_pieces_they_come(
    tmp_path: Path,
):
    manifest = a_manifest()
    changes = LocalChanges.write(
        tmp_path / "changes",
        manifest,
        6,
        [
            ("a", positions(0, 2), np.array([10, 12], "<u4")),
            ("a", positions(5), np.array([15], "<u4")),
            ("b", positions(3), np.array([23], "<u2")),
            ("c", positions(0, 1), np.array([30, 31], "<u4")),
        ],
    )
    assert (changes.base_version, changes.num_changed) == (6, 6)
    read = [(name, where.tolist(), words.dtype, words.tolist()) for name, where, words in changes.read(manifest)]
    assert read == [
        ("a", [0, 2, 5], np.dtype("<u4"), [10, 12, 15]),
        ("b", [3], np.dtype("<u2"), [23]),
        ("c", [0, 1], np.dtype("<u4"), [30, 31]),
    ]


def test_nothing_may_have_changed(tmp_path: Path):
    manifest = a_manifest()
    changes = LocalChanges.write(tmp_path / "changes", manifest, 6, [])
    assert (list(changes.read(manifest)), changes.num_changed) == ([], 0)


def test_what_came_before_in_the_same_file_is_gone(tmp_path: Path):
    manifest, path = a_manifest(), tmp_path / "changes"
    LocalChanges.write(path, manifest, 6, [("a", positions(0, 1, 2), np.array([1, 2, 3], "<u4"))])
    changes = LocalChanges.write(path, manifest, 7, [("c", positions(2), np.array([9], "<u4"))])
    [(name, where, words)] = changes.read(manifest)
    assert (name, where.tolist(), words.tolist(), path.stat().st_size) == ("c", [2], [9], 8)


def test_an_update_is_prepared_without_a_look_at_the_model(tmp_path: Path):
    manifest = a_manifest()
    changes = LocalChanges.write(tmp_path / "changes", manifest, 6, [("b", positions(1), np.array([9], "<u2"))])
    in_place = InPlaceChanges()
    in_place.learn([(0, [[name, name, 0, [size], [1], 0] for name, size in (("a", 6), ("b", 4), ("c", 3))], "")])
    snapshot = LocalSnapshot(manifest=manifest, path=tmp_path / "no such file", changes=changes)
    patches = in_place.prepare(snapshot, loaded_version=6)
    assert patches is not None
    [patch] = patches
    assert (patch.num_items, patch.parts) == (1, (("b", 0, 1),))
    assert patch.path.read_bytes() == positions(1).tobytes() + np.array([9], "<u2").tobytes()
    in_place.close()
