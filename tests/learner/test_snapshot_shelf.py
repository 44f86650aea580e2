import pytest

from common.snapshot import NO_VERSION, SnapshotManifest, TensorSpec, build_manifest
from learner.snapshot_shelf import SnapshotShelf


def a_manifest(version: int, num_chunks: int = 3) -> SnapshotManifest:
    tensors = (TensorSpec(name="weight", shape=(num_chunks,), dtype="float32", offset=0),)
    return build_manifest(memoryview(bytes(4 * num_chunks)), tensors, run_id="run", version=version, chunk_bytes=4)


def a_shelf(*versions: int) -> SnapshotShelf:
    shelf = SnapshotShelf(patience_s=5.0)
    for slot, version in enumerate(versions):
        shelf.put(a_manifest(version), slot)
    return shelf


def test_an_empty_shelf_has_no_version():
    assert a_shelf().newest_version == NO_VERSION
    assert a_shelf().request_chunk(b"server", 0, 0, 0.0) is None


def test_the_newest_snapshot_is_kept_even_when_nobody_pulls_it():
    shelf = a_shelf(0)
    assert shelf.release(1e9) == []
    assert shelf.request_chunk(b"server", 0, 2, 0.0) == 0


def test_an_older_snapshot_nobody_pulls_gives_its_slot_back():
    assert a_shelf(0, 1).release(0.0) == [0]


def test_an_older_snapshot_is_kept_until_its_last_chunk_was_sent():
    shelf = a_shelf(0)
    shelf.request_chunk(b"server", 0, 0, 1.0)
    shelf.put(a_manifest(1), 1)
    shelf.request_chunk(b"server", 0, 1, 1.5)
    assert shelf.release(2.0) == []
    shelf.request_chunk(b"server", 0, 2, 2.5)
    assert shelf.release(2.5) == [0]
    assert repr(shelf) == "<SnapshotShelf newest 1, keeps [1], 0 pulls seen>"


def test_a_chunk_asked_for_twice_does_not_count_as_another_chunk():
    shelf = a_shelf(0)
    for _ in range(3):
        shelf.request_chunk(b"server", 0, 0, 1.0)
    shelf.put(a_manifest(1), 1)
    assert shelf.release(1.0) == []


def test_a_server_that_fell_silent_holds_a_slot_no_longer_than_the_patience():
    shelf = a_shelf(0)
    shelf.request_chunk(b"server", 0, 0, 1.0)
    shelf.put(a_manifest(1), 1)
    assert shelf.release(5.9) == []
    assert shelf.release(6.1) == [0]
    assert shelf.request_chunk(b"server", 0, 1, 6.2) is None


def pull(shelf: SnapshotShelf, peer: bytes, version: int, num_chunks: int, began_s: float, now_s: float) -> None:
    """So many chunks at an even pace until now."""
    for index in range(num_chunks):
        shelf.request_chunk(peer, version, index, began_s + (now_s - began_s) * index / max(num_chunks - 1, 1))


def test_of_two_older_snapshots_that_are_pulled_the_one_that_a_server_will_have_sooner_is_kept():
    shelf = SnapshotShelf()
    for version in range(3):
        shelf.put(a_manifest(version, num_chunks=100), slot=version)
    pull(shelf, b"slow", 0, 60, 0.0, 60.0)  # 40 s to go
    pull(shelf, b"fast", 1, 20, 59.0, 60.0)  # 4 s to go, although less of it is there
    assert shelf.release(60.0) == [0]
    assert shelf.request_chunk(b"slow", 0, 60, 60.0) is None
    assert shelf.request_chunk(b"fast", 1, 20, 60.0) == 1


def test_a_slow_server_keeps_its_version_as_long_as_nobody_else_needs_the_slot():
    shelf = SnapshotShelf()
    shelf.put(a_manifest(0, num_chunks=100), slot=0)
    for version in range(1, 50):
        pull(shelf, b"slow", 0, 2 * version, 0.0, float(version))
        shelf.put(a_manifest(version, num_chunks=100), slot=1 + version % 2)
        released = shelf.release(float(version))
        assert released == ([1 + (version - 1) % 2] if version > 1 else [])


def test_there_is_always_a_slot_for_the_next_version_however_many_servers_pull_old_ones():
    shelf = SnapshotShelf()
    free = [0, 1, 2]
    for version in range(50):
        shelf.put(a_manifest(version), free.pop())
        for peer in range(8):
            shelf.request_chunk(bytes([peer]), version, peer % 2, float(version))
        free += shelf.release(float(version))
        assert free


def test_a_chunk_that_does_not_exist_is_not_served():
    assert a_shelf(0).request_chunk(b"server", 0, 3, 0.0) is None


def test_versions_only_grow():
    with pytest.raises(ValueError, match="not newer than 4"):
        a_shelf(4).put(a_manifest(4), 1)
