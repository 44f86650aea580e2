"""CheckpointStore: whenever the process dies, what CURRENT names is a whole checkpoint."""

import os
import shutil
from pathlib import Path

import pytest

from common.lifecycle import UserError
from learner.checkpoint import CheckpointStore


class Died(BaseException):
    """The process ended here: nothing may catch it."""


def save(store: CheckpointStore, version: int, content: str = "weights") -> Path:
    return store.save(
        version=version,
        model="model",
        frontier=f"frontier {version}".encode(),
        write_engine=lambda directory: write_files(directory, f"{content} {version}"),
    )


def write_files(directory: Path, content: str) -> None:
    (directory / "policy").mkdir()
    (directory / "policy" / "weights").write_text(content)


def contents(store: CheckpointStore) -> tuple[int, bytes, str] | None:
    checkpoint = store.latest()
    if checkpoint is None:
        return None
    weights = (checkpoint.directory / "policy" / "weights").read_text()
    return checkpoint.state.version, checkpoint.state.frontier, weights


@pytest.fixture
def store(tmp_path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def test_a_new_run_has_no_checkpoint(store):
    assert store.latest() is None


def test_what_was_saved_last_is_what_is_resumed_from(store):
    save(store, 0)
    save(store, 50)
    assert contents(store) == (50, b"frontier 50", "weights 50")


def test_as_many_are_kept_as_asked_for_and_the_newest_is_among_them(store, tmp_path):
    for version in (0, 5, 10, 15):
        save(store, version)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["CURRENT", "step-000010", "step-000015"]


def test_the_newest_are_kept_by_number_rather_than_by_name(store, tmp_path):
    for version in (999_998, 999_999, 1_000_000):
        save(store, version)
    assert contents(store) == (1_000_000, b"frontier 1000000", "weights 1000000")
    assert not (tmp_path / "checkpoints" / "step-999998").exists()
    assert (tmp_path / "checkpoints" / "step-999999").exists()


def test_a_checkpoint_beyond_the_current_one_takes_nobodys_place_and_is_left_alone(store, tmp_path):
    for version in (5, 90):
        save(store, version)
    (tmp_path / "checkpoints" / "CURRENT").write_text("step-000005\n")  # somebody went back
    save(store, 6)
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-000005", "step-000006", "step-000090"]


def test_a_version_that_is_saved_already_is_not_written_again(store):
    path = save(store, 5, "first")
    assert save(store, 5, "second") == path
    assert contents(store) == (5, b"frontier 5", "first 5")


def test_a_directory_that_was_renamed_but_never_named_by_current_is_written_anew(store, tmp_path):
    """Its life of the run ended there; the resumed one took the step again, from other data."""
    save(store, 0)
    abandoned = tmp_path / "checkpoints" / "step-000005"
    abandoned.mkdir()
    (abandoned / "leftover").write_text("of another life")
    assert contents(store)[0] == 0
    save(store, 5)
    assert contents(store) == (5, b"frontier 5", "weights 5")
    assert not (abandoned / "leftover").exists()


def test_a_torn_directory_is_never_taken_and_does_not_stay(store, tmp_path):
    save(store, 0)
    torn = tmp_path / "checkpoints" / "step-000007.tmp"
    write_files_of_a_torn_checkpoint(torn)
    assert contents(store)[0] == 0
    save(store, 9)
    assert contents(store)[0] == 9
    assert not torn.exists()


def write_files_of_a_torn_checkpoint(directory: Path) -> None:
    directory.mkdir()
    (directory / "run.json").write_text('{"format": 1, "vers')


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("nth", range(12))
@pytest.mark.parametrize("was_abandoned", [False, True])
def test_a_crash_anywhere_in_a_save_leaves_the_old_or_the_new_checkpoint_whole(
    store, tmp_path, monkeypatch, nth, when, was_abandoned
):
    save(store, 4)
    if was_abandoned:
        abandoned = tmp_path / "checkpoints" / "step-000005"
        abandoned.mkdir()
        write_files(abandoned, "of another life")
    calls = die_at_call(monkeypatch, nth, when)
    try:
        save(store, 5)
    except Died:
        assert len(calls) == nth + 1
    else:
        assert len(calls) <= nth  # the save has fewer calls than that
    monkeypatch.undo()
    known = contents(store)
    assert known in [(4, b"frontier 4", "weights 4"), (5, b"frontier 5", "weights 5")]
    if "replace" in calls[:-1]:  # CURRENT was replaced: from then on the new one
        assert known[0] == 5
    save(store, 5)
    assert contents(store) == (5, b"frontier 5", "weights 5")
    save(store, 6)
    assert contents(store) == (6, b"frontier 6", "weights 6")


def die_at_call(monkeypatch, nth: int, when: str) -> list[str]:
    """Raise before or after the nth call that touches the disk; returns the calls as they come."""
    calls: list[str] = []
    for owner, name in [
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "rename"),
        (Path, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
    ]:

        def dying(*args, original=getattr(owner, name), name=name, **kwargs):  # noqa: B008 - the owner's at this time
            calls.append(name)
            if when == "before" and len(calls) == nth + 1:
                raise Died
            result = original(*args, **kwargs)
            if when == "after" and len(calls) == nth + 1:
                raise Died
            return result

        monkeypatch.setattr(owner, name, dying)
    return calls


def test_a_crash_while_the_engine_writes_leaves_the_old_checkpoint(store):
    save(store, 4)

    def die_halfway(directory: Path) -> None:
        write_files(directory, "half")
        raise Died

    with pytest.raises(Died):
        store.save(version=5, model="model", frontier=b"", write_engine=die_halfway)
    assert contents(store) == (4, b"frontier 4", "weights 4")


def test_everything_is_on_disk_before_current_names_it(store, tmp_path, monkeypatch):
    """A power cut keeps what was synchronised and may lose the rest: files, then their directories, then CURRENT."""
    order: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(str(path.relative_to(tmp_path / "checkpoints")))
        real_fsync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        order.append("replace")
        return real_replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save(store, 5)
    replaced = order.index("replace")
    whole = {f"step-000005.tmp{part}" for part in ("", "/run.json", "/policy", "/policy/weights")}
    assert whole | {".", "CURRENT.tmp"} <= set(order[:replaced])
    assert order[replaced + 1 :] == ["."]


@pytest.mark.parametrize("broken", [b"", b"{", b'{"format": 1, "version": "x", "model": "", "frontier": ""}'])
def test_a_checkpoint_that_cannot_be_read_is_named_rather_than_skipped(store, broken):
    path = save(store, 5)
    (path / "run.json").write_bytes(broken)
    with pytest.raises(UserError, match=r"the checkpoint .*step-000005 cannot be read: "):
        store.latest()


def test_a_checkpoint_that_was_deleted_by_hand_is_named(store):
    shutil.rmtree(save(store, 5))
    with pytest.raises(UserError, match=r"the checkpoint .*step-000005 cannot be read: "):
        store.latest()


def test_a_checkpoint_of_another_format_is_refused(store):
    path = save(store, 5) / "run.json"
    path.write_text(path.read_text().replace('"format":1', '"format":2'))
    with pytest.raises(UserError, match="has format 2, this version reads 1"):
        store.latest()
