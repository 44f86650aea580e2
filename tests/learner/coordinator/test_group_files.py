import os

import pytest

from learner.coordinator import group_files
from learner.coordinator.group_files import FILE_BYTES, DamagedGroupError, GroupFiles

SMALL, BIG = (b"header", b"payload"), (b"header", bytes(range(256)) * (FILE_BYTES // 256))


@pytest.fixture
def files(tmp_path):
    files = GroupFiles(tmp_path / "groups", needed=())
    yield files
    files.close()


def names(tmp_path):
    return sorted(path.name for path in (tmp_path / "groups").iterdir())


def test_groups_lie_one_behind_the_other_and_are_read_where_they_lie(files):
    groups = [(b"a" * index, memoryview(b"b" * (5 - index))) for index in range(1, 5)]
    places = files.append(groups[:2]) + files.append(groups[2:])
    assert [(place.file, place.offset) for place in places] == [(1, 0), (1, 5), (1, 10), (1, 15)]
    assert [files.read(place) for place in places] == [(header, bytes(payload)) for header, payload in groups]


def test_a_group_without_payload_is_read_like_any_other(files):
    [place] = files.append([(b"header", b"")])
    assert files.read(place) == (b"header", b"")


def test_nothing_is_written_for_no_groups(files, tmp_path):
    assert files.append([]) == []
    assert names(tmp_path) == []


def test_what_the_kernel_takes_only_in_part_is_written_whole(files, monkeypatch):
    write = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda to, pieces, offset: write(to, [memoryview(pieces[0])[:3]], offset))
    groups = [(b"header", b"payload"), (b"he", b""), (b"h", b"the last")]
    places = files.append(groups)
    assert [files.read(place) for place in places] == groups


def test_more_pieces_than_the_kernel_takes_at_once_are_written(files):
    groups = [(b"%d" % index, b"payload") for index in range(3 * group_files.MAX_PIECES)]
    assert [files.read(place) for place in files.append(groups)] == groups


def test_groups_are_on_the_disk_when_append_returns(files, monkeypatch):
    synced, sync = [], os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (sync(descriptor), synced.append(descriptor)))
    files.append([SMALL])
    files.append([SMALL, SMALL])
    assert len(synced) == 2


def test_the_names_of_new_files_and_of_their_directory_are_on_the_disk_too(monkeypatch, tmp_path):
    synced = []
    monkeypatch.setattr(group_files.disk, "sync", synced.append)
    files = GroupFiles(tmp_path / "groups", needed=())
    assert synced == [tmp_path]
    files.append([SMALL])
    assert synced == [tmp_path, tmp_path / "groups"]
    files.close()


def test_a_full_file_is_followed_by_another(files, tmp_path):
    places = [files.append([group])[0] for group in (BIG, SMALL, SMALL)]
    assert [(place.file, place.offset) for place in places] == [(1, 0), (2, 0), (2, 13)]
    assert files.read(places[0]) == BIG


def test_a_file_in_which_nothing_is_needed_is_written_again(files, tmp_path):
    first, second = (files.append([BIG])[0] for _ in range(2))
    files.append([SMALL])
    files.reuse_all_but({second.file, 3})
    assert [files.append([BIG])[0].file for _ in range(3)] == [3, 1, 4]
    assert files.read(second) == BIG
    assert names(tmp_path) == ["00000001", "00000002", "00000003", "00000004"]
    with pytest.raises(DamagedGroupError, match="00000009 is missing"):
        files.read(group_files.Place(9, *(first.offset, first.header_bytes, first.payload_bytes, first.digest)))


def test_the_file_that_is_being_written_is_not_begun_again_though_nothing_in_it_is_needed(files):
    files.append([SMALL])
    files.reuse_all_but(())
    [place] = files.append([SMALL])
    assert (place.file, place.offset) == (1, 13)


def test_a_file_that_was_much_larger_than_usual_gives_its_room_back(files, tmp_path):
    files.append([(b"header", bytes(4 * FILE_BYTES))])
    files.append([BIG])
    files.reuse_all_but({2})
    [place] = files.append([SMALL])
    assert place.file == 1
    assert (tmp_path / "groups" / "00000001").stat().st_size == FILE_BYTES


def test_after_a_failure_the_next_group_lies_where_the_failed_one_would_have(files, monkeypatch):
    def no_room(*_):
        raise OSError("no room")

    files.append([SMALL])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", no_room)
        with pytest.raises(OSError, match="no room"):
            files.append([SMALL])
    [place] = files.append([(b"another", b"one")])
    assert place.offset == 13
    assert files.read(place) == (b"another", b"one")


def test_files_that_are_needed_stay_as_they_are_after_a_restart(tmp_path, files):
    places = [files.append([group])[0] for group in (BIG, SMALL)]
    files.close()
    again = GroupFiles(tmp_path / "groups", needed={1, 2})
    [place] = again.append([SMALL])
    assert place.file == 3
    assert [again.read(place) for place in places] == [BIG, SMALL]
    again.close()
