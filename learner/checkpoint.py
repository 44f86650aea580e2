"""CheckpointStore: checkpoints as atomic units. One is whole or it does not exist.

A checkpoint is written into `step-N.tmp`, made durable, renamed to `step-N`, and only then named in `CURRENT`.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from common import disk
from common.lifecycle import UserError

FORMAT = 1


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint holds beside the engine's own files."""

    format: int
    version: int
    model: str
    frontier: bytes  # the coordinator's, see learner/coordinator/ledger.py


@dataclass(frozen=True, slots=True)
class Checkpoint:
    directory: Path
    state: RunState


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, directory: Path, *, keep: int) -> None:
        self._directory = directory
        self._keep = keep
        self._current = directory / "CURRENT"

    def latest(self) -> Checkpoint | None:
        """The checkpoint that CURRENT names, None for a new run; raises UserError when it cannot be read."""
        name = self._current_name()
        if name is None:
            return None
        directory = self._directory / name
        try:
            state = msgspec.json.decode((directory / "run.json").read_bytes(), type=RunState)
        except (OSError, msgspec.MsgspecError) as error:
            raise UserError(f"the checkpoint {directory} cannot be read: {error}") from error
        if state.format != FORMAT:
            raise UserError(f"the checkpoint {directory} has format {state.format}, this version reads {FORMAT}")
        return Checkpoint(directory, state)

    def current_version(self) -> int | None:
        """Of the checkpoint that CURRENT names."""
        name = self._current_name()
        return _version_of(Path(name)) if name is not None else None

    def holds(self, version: int) -> bool:
        """Whether CURRENT names it."""
        return self._current_name() == self.path_of(version).name

    def path_of(self, version: int) -> Path:
        return self._directory / f"step-{version:06d}"

    def save(self, *, version: int, model: str, frontier: bytes, write_engine: Callable[[Path], None]) -> Path:
        """Write a checkpoint; `write_engine` puts the engine's files into the directory it is given.

        The version that CURRENT names already is not written again.
        """
        final = self.path_of(version)
        if self.holds(version):
            return final
        temporary = final.with_name(f"{final.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_engine(temporary)
        state = RunState(format=FORMAT, version=version, model=model, frontier=frontier)
        (temporary / "run.json").write_bytes(msgspec.json.encode(state))
        _make_durable(temporary)
        if final.exists():  # of a life of this run that ended before CURRENT named it
            shutil.rmtree(final)
        temporary.rename(final)
        disk.sync(self._directory)
        self._point_to(final.name)
        self._delete_old(version)
        return final

    def _current_name(self) -> str | None:
        return self._current.read_text().strip() if self._current.exists() else None

    def _point_to(self, name: str) -> None:
        replacement = self._directory / "CURRENT.tmp"
        with replacement.open("w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        replacement.replace(self._current)
        disk.sync(self._directory)

    def _delete_old(self, version: int) -> None:
        """Those before the current one, and what a crash left half written."""
        steps = [path for path in self._directory.glob("step-*") if path.suffix != ".tmp"]
        known = sorted((_version_of(path), path) for path in steps if _version_of(path) <= version)
        torn = list(self._directory.glob("step-*.tmp"))
        for path in [path for _, path in known[: -self._keep]] + torn:
            shutil.rmtree(path)


def _version_of(directory: Path) -> int:
    return int(directory.name.removeprefix("step-"))


def _make_durable(directory: Path) -> None:
    for root, _, files in os.walk(directory):
        for file in files:
            disk.sync(Path(root) / file)
        disk.sync(Path(root))
