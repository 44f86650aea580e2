"""RunDirectory: one run's identity, its places on disk, and the lock that keeps a second learner out of it."""

import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.lifecycle import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDirectory:
    """Where a run keeps what it needs to be resumed.

    A learner that resumes continues the version numbers of its checkpoint, so a version alone does not say which
    weights it means: `lineage` counts the learner's starts, and snapshots carry both.
    """

    path: Path
    run_id: str
    lineage: int
    private: Path  # short path that only this user can enter, for local sockets; gone when the learner ends

    @property
    def lineage_id(self) -> str:
        return f"{self.run_id}.{self.lineage}"

    @property
    def checkpoints(self) -> Path:
        return checkpoints_in(self.path)

    @property
    def refused(self) -> Path:
        return self.path / "refused"

    @property
    def keys(self) -> Path:
        return self.path / "keys"

    @property
    def huggingface(self) -> Path:
        return self.path / "huggingface"

    def remembered_address(self) -> str | None:
        """The address rollout servers joined at before; servers that wait there find the resumed run again."""
        path = self.path / "address"
        return path.read_text().strip() if path.exists() else None

    def remember_address(self, address: str) -> None:
        (self.path / "address").write_text(address + "\n")


def checkpoints_in(run_directory: Path) -> Path:
    return run_directory / "checkpoints"


@contextmanager
def open_run_directory(path: Path) -> Iterator[RunDirectory]:
    """Raises UserError when it cannot be written, or another learner is using it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "lock").touch()
    except OSError as error:
        raise UserError(f"cannot write into --run-dir {path}: {error.strerror}; choose another") from error
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{path} is in use by another learner; choose another --run-dir, or stop that one"
            ) from error
        run_id, lineage = _begin_lineage(path / "run.json")
        private = Path(tempfile.mkdtemp(prefix="countercurrent-"))
        try:
            yield RunDirectory(path=path, run_id=run_id, lineage=lineage, private=private)
        finally:
            shutil.rmtree(private)


def _begin_lineage(path: Path) -> tuple[str, int]:
    """Durable before anything is published under it."""
    if path.exists():
        known = json.loads(path.read_text())
        run_id, lineage = str(known["run_id"]), int(known["lineage"]) + 1
    else:
        run_id, lineage = secrets.token_hex(4), 1
    replacement = path.with_suffix(".tmp")
    with replacement.open("w") as file:
        json.dump({"run_id": run_id, "lineage": lineage}, file)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)
    return run_id, lineage
