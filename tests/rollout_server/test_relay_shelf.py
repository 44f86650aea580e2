"""RelayShelf: what a server gives of what it holds, and when it gives it no more."""

import threading
from collections.abc import Callable

import pytest

from common.codec import Frame
from common.snapshot import SnapshotManifest, verify_chunk
from common.snapshot_answers import ChunkLaterError
from common.weight_messages import ChunkRequest, ManifestRequest
from rollout_server.relay_shelf import RelayShelf
from tests.rollout_server.builders_snapshots import NUM_CHUNKS, a_delta, a_manifest, a_table


def an_open_shelf() -> RelayShelf:
    shelf = RelayShelf()
    shelf.is_open = True
    return shelf


def holding(version: int) -> tuple[RelayShelf, SnapshotManifest]:
    shelf, manifest = an_open_shelf(), a_manifest(version)
    memory = memoryview(a_table(version).tobytes())
    shelf.begin(manifest, memory)
    shelf.complete(manifest, memory)
    return shelf, manifest


def ask(shelf: RelayShelf, manifest, index: int = 0) -> Frame | None:
    return shelf.chunk(b"peer", ChunkRequest(version=manifest.version, index=index, digest=manifest.digest))


def test_a_chunk_is_given_as_soon_as_it_is_there_and_others_come_later():
    shelf, manifest, memory = an_open_shelf(), a_manifest(3), memoryview(a_table(3).tobytes())
    shelf.begin(manifest, memory)
    shelf.arrived(5)
    chunk = ask(shelf, manifest, 5)
    assert chunk is not None
    verify_chunk(manifest, 5, chunk)
    with pytest.raises(ChunkLaterError):
        ask(shelf, manifest, 6)
    assert ask(shelf, manifest, NUM_CHUNKS) is None
    assert repr(shelf) == "<RelayShelf 1 chunks of snapshot 3>"


def test_a_version_that_was_not_heard_of_comes_later_and_one_that_is_past_does_not():
    shelf, _ = holding(3)
    shelf.begin(a_manifest(4), memoryview(bytes(1)))
    with pytest.raises(ChunkLaterError):
        ask(shelf, a_manifest(5))
    assert ask(shelf, a_manifest(3)) is None


def test_while_a_delta_is_pulled_the_former_snapshot_is_still_given_and_what_it_leads_to_comes_later():
    shelf, former = holding(3)
    delta, data = a_delta(3, 4)
    shelf.begin(delta, memoryview(data))
    assert ask(shelf, former) is not None
    with pytest.raises(ChunkLaterError):
        ask(shelf, delta.target)
    shelf.change()
    assert ask(shelf, former) is None
    shelf.complete(delta.target, memoryview(a_table(4).tobytes()))
    chunk = ask(shelf, delta.target)
    assert chunk is not None
    verify_chunk(delta.target, 0, chunk)


class SlowMemory:
    """Takes as long to read as it is told to."""

    def __init__(self) -> None:
        self.is_read = threading.Event()
        self.may_go_on = threading.Event()

    def __getitem__(self, place: slice) -> bytes:
        self.is_read.set()
        assert self.may_go_on.wait(10)
        return a_table(3).tobytes()[place]


@pytest.mark.parametrize("stop", [RelayShelf.change, RelayShelf.withdraw])
def test_bytes_are_not_changed_before_the_last_reader_has_copied_them(stop: Callable[[RelayShelf], None]):
    shelf, manifest, memory = an_open_shelf(), a_manifest(3), SlowMemory()
    shelf.begin(manifest, memory)  # type: ignore[arg-type]  # slow
    shelf.arrived(0)
    chunks: list[Frame | None] = []
    reader = threading.Thread(target=lambda: chunks.append(ask(shelf, manifest)))
    reader.start()
    assert memory.is_read.wait(10)
    changer = threading.Thread(target=stop, args=(shelf,))
    changer.start()
    changer.join(0.1)
    assert changer.is_alive()
    memory.may_go_on.set()
    for thread in (reader, changer):
        thread.join(10)
        assert not thread.is_alive()
    assert chunks == [a_table(3).tobytes()[:64]]
    assert ask(shelf, manifest) is None


def test_however_many_versions_come_one_snapshot_and_one_delta_are_held_at_most():
    shelf, _ = holding(0)
    for version in range(1, 6):
        delta, data = a_delta(version - 1, version)
        shelf.begin(delta, memoryview(data))
        assert repr(shelf).count("chunks of") == 2
        shelf.change()
        shelf.complete(delta.target, memoryview(a_table(version).tobytes()))
        assert repr(shelf).count("chunks of") == 2


def test_a_version_of_another_run_under_the_same_number_is_not_held():
    shelf, manifest = holding(3)
    assert ask(shelf, a_manifest(3, run_id="run.2")) is None
    assert ask(shelf, manifest) is not None


def test_nothing_is_given_any_more_of_what_was_withdrawn_nor_kept_by_a_server_that_relays_nothing():
    shelf, manifest = holding(3)
    shelf.begin(delta := a_delta(3, 4)[0], memoryview(bytes(delta.num_bytes)))
    shelf.withdraw()
    assert (ask(shelf, manifest), ask(shelf, delta)) == (None, None)
    closed = RelayShelf()
    closed.begin(manifest, memoryview(bytes(1)))
    closed.complete(manifest, memoryview(bytes(1)))
    assert repr(closed) == "<RelayShelf empty>"


def test_a_relay_knows_no_manifest():
    assert holding(3)[0].offer(ManifestRequest(newer_than=-1)) is None
