import pytest

from common.delta import build_delta_manifest
from common.snapshot import NO_VERSION, SnapshotManifest, TensorSpec, build_manifest
from learner.delta_shelf import Delta, DeltaShelf

SNAPSHOT_BYTES = 4000


def a_manifest(version: int) -> SnapshotManifest:
    tensors = (TensorSpec("weight", (SNAPSHOT_BYTES // 4,), "float32", 0),)
    return build_manifest(memoryview(bytes(SNAPSHOT_BYTES)), tensors, run_id="run", version=version)


def a_shelf(*delta_bytes: int | None) -> DeltaShelf:
    """Versions 0, 1, ... with deltas of so many bytes between them; None: it does not pay."""
    shelf = DeltaShelf()
    shelf.put(None, a_manifest(0), None)
    for base, num_bytes in enumerate(delta_bytes):
        old, new = a_manifest(base), a_manifest(base + 1)
        delta = Delta(*build_delta_manifest(old, new, [bytes(num_bytes)], chunk_bytes=100)) if num_bytes else None
        shelf.put(old, new, delta)
    return shelf


def versions_after(shelf: DeltaShelf, held: int) -> list[int] | str:
    """The way to the newest version, or why there is none."""
    way: list[int] = []
    while isinstance(step := shelf.after(held), Delta):
        held = step.manifest.version
        way.append(held)
    return way or step


def test_deltas_lead_from_any_version_that_is_kept_to_the_newest():
    shelf = a_shelf(300, 300, 300)
    assert versions_after(shelf, 0) == [1, 2, 3]
    assert versions_after(shelf, 2) == [3]
    assert repr(shelf) == "<DeltaShelf from [0, 1, 2], 900 bytes>"


def test_together_they_take_at_most_half_of_a_full_snapshot_and_the_oldest_go_first():
    shelf = a_shelf(900, 900, 900)
    assert versions_after(shelf, 0) == "base is gone"
    assert versions_after(shelf, 1) == [2, 3]


def test_a_delta_that_does_not_pay_cuts_the_chain():
    shelf = a_shelf(300, None, 300)
    assert versions_after(shelf, 0) == "base is gone"
    assert versions_after(shelf, 1) == "a delta does not pay"
    assert versions_after(shelf, 2) == [3]


def test_a_server_without_a_base_pulls_everything_and_all_reasons_are_counted():
    shelf = a_shelf(300, None)
    for held in (NO_VERSION, NO_VERSION, 0, 1):
        shelf.after(held)
    assert shelf.full_pulls == {"no base": 2, "base is gone": 1, "a delta does not pay": 1}


@pytest.mark.parametrize(("base", "version", "index"), [(0, 2, 0), (1, 1, 0), (5, 6, 0), (0, 1, 3)])
def test_a_chunk_of_another_delta_or_place_is_not_served(base: int, version: int, index: int):
    assert a_shelf(300, 300).chunk(base, version, index) is None


def test_chunks_are_the_parts_of_the_delta_in_order():
    shelf = DeltaShelf()
    data = bytes(range(250))
    delta = Delta(*build_delta_manifest(a_manifest(0), a_manifest(1), [data], chunk_bytes=100))
    shelf.put(a_manifest(0), a_manifest(1), delta)
    chunks = [shelf.chunk(0, 1, index) for index in range(3)]
    assert b"".join(chunk for chunk in chunks if chunk is not None) == data
