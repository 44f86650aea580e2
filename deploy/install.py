"""Creates .venv and installs what the lock file of this platform lists. Run by `make`; needs Python 3.11+ alone.

Running it again is quick: a stamp in .venv says what was installed. An interrupted installation is begun anew (pip
keeps its downloads), because a half-unpacked package looks like an installed one. Two at once wait for each other.
"""

from __future__ import annotations  # an older Python must get as far as being told that it is too old

import argparse
import fcntl
import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
LOCKED_TORCH = "torch==2.13.0+cpu"
CUDA_TORCH = "torch==2.13.0"  # runs on a CPU as well, but brings gigabytes of CUDA libraries
CPU_GB, CUDA_GB = 6, 20  # disk an installation needs, downloads included
OPTIONS = {
    "cpu": "install for the CPU even where there is a GPU",
    "allow-cuda-torch": f"take {CUDA_TORCH} for {LOCKED_TORCH}",
}
LOG_LINES_SHOWN = 15
PROGRESS_EVERY_S = 10.0


class InstallError(Exception):
    """What went wrong, and what to do."""


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0


def lock_file(system: str, machine: str, *, gpu: bool, root: Path = ROOT) -> Path:
    """The lock file of a platform; raises InstallError when there is none."""
    path = root / "deploy" / "requirements" / f"{system.lower()}-{machine}-{'gpu' if gpu else 'cpu'}.txt"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise InstallError(f"there is no lock file for {path.stem}; there are: {known}")
    return path


def requirements_of(lock: Path, *, allow_cuda_torch: bool) -> list[str]:
    lines = [line.strip() for line in lock.read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    return [CUDA_TORCH if allow_cuda_torch and line == LOCKED_TORCH else line for line in wanted]


def name_of(requirement: str) -> str:
    """The package of `name==version`, spelled as indexes compare it."""
    return re.sub(r"[-_.]+", "-", requirement.partition("==")[0]).lower()


def stamp_of(requirements: Sequence[str], root: Path = ROOT) -> str:
    """What decides whether an installation is up to date. Its first line decides whether it can be brought up to date:
    another Python, or another place (scripts name theirs), needs a new one."""
    import tomllib

    declared = tomllib.loads((root / "pyproject.toml").read_text())
    about_us = {"project": declared["project"], "setuptools": declared["tool"]["setuptools"]}
    digest = hashlib.sha256("\0".join([*requirements, json.dumps(about_us)]).encode())
    return f"{json.dumps([sys.version, sys.base_prefix, str(root)])}\n{digest.hexdigest()}\n"


def advice(log: str) -> str:
    """What to do about a failed pip, from what it printed."""
    if "ensurepip" in log:
        return (
            f"{sys.executable} cannot give an environment its pip; on Debian and Ubuntu: apt-get install python3-venv"
        )
    missing = "No matching distribution" in log or "Could not find a version" in log
    if missing and LOCKED_TORCH in log:
        return (
            f"Your package index does not have {LOCKED_TORCH}, the CPU build of PyTorch. Point pip at one that has "
            "it (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), or run: python3 deploy/install.py --allow-cuda-torch\n"
            "which takes the much larger CUDA build instead."
        )
    if "No space left" in log:
        return "The disk is full: free some space, then run make again."
    if missing or "Connection" in log or "Temporary failure" in log:
        return "Is your package index reachable, and complete? Try: pip download --no-deps msgspec"
    return "Run make again: what was downloaded already is not downloaded twice."


def require_space(root: Path, needed_gb: int) -> None:
    free_gb = shutil.disk_usage(root).free / 1e9
    if free_gb < needed_gb:
        raise InstallError(f"{root} has {free_gb:.1f} GB free, the installation needs {needed_gb} GB: free some space")


def remembered(path: Path, given: set[str]) -> set[str]:
    """The options given now or by an earlier run: `make` itself gives none, and must not undo what was asked for."""
    options = given | set(path.read_text().split() if path.exists() else ())
    if given:
        path.write_text("\n".join(sorted(options)) + "\n")
    return options


@contextmanager
def one_at_a_time(path: Path) -> Iterator[int]:
    """Waits until no other installation runs. Yields the file descriptor that holds the lock: a pip that inherits it
    keeps others out even after this process was killed."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another installation is running in this folder; waiting for it to end", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


class Installer:
    """Installs into root/.venv."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._directory = root / ".venv"
        self._removed = root / ".venv.removed"
        self._python = self._directory / "bin" / "python"
        self._stamp = self._directory / "installed"
        self._listed = self._directory / "requirements.txt"
        self._log = self._directory / "install.log"

    def is_done(self, stamp: str) -> bool:
        return self._stamp.exists() and self._stamp.read_text() == stamp and self._python.exists()

    def run(self, requirements: Sequence[str], stamp: str, *, needed_gb: int, lock_descriptor: int) -> None:
        """Raises InstallError. Whatever interrupts it leaves no stamp behind."""
        started_s = time.monotonic()
        dropped = self._prepare(stamp, needed_gb)
        verb = "updating" if dropped is not None else "installing"
        print(f"{verb} {len(requirements)} locked packages in {self._directory}; details: {self._log}", flush=True)
        self._stamp.unlink(missing_ok=True)
        venv.create(self._directory, symlinks=True)
        self._run("pip", lock_descriptor, "ensurepip", "--upgrade")
        if gone := sorted((dropped or set()) - {name_of(line) for line in requirements}):
            self._run("packages no longer needed", lock_descriptor, "pip", "uninstall", "--yes", *gone)
        self._listed.write_text("\n".join(requirements) + "\n")
        install = ("pip", "install", "--disable-pip-version-check", "--no-input", "--no-deps")
        self._run("packages", lock_descriptor, *install, "-r", str(self._listed))
        self._run("this project", lock_descriptor, *install, "--no-build-isolation", "-e", str(self._root))
        self._stamp.write_text(stamp)
        print(f"installed in {time.monotonic() - started_s:.0f} s")

    def _prepare(self, stamp: str, needed_gb: int) -> set[str] | None:
        """Names of the packages installed before, where there is something to update; else None, and nothing there."""
        if self._removed.exists():
            shutil.rmtree(self._removed)
        if self._directory.is_symlink() or (self._directory.exists() and not self._log.exists()):
            raise InstallError(f"{self._directory} was not made by this installer; move it away, then run make again")
        if self._stamp.exists() and self._stamp.read_text().splitlines()[:1] == stamp.splitlines()[:1]:
            return {name_of(line) for line in self._listed.read_text().splitlines()}
        if self._directory.exists():
            why = "made by another Python or in another place" if self._stamp.exists() else "interrupted"
            print(f"an earlier installation ({why}) is removed first", flush=True)
            self._directory.rename(self._removed)  # at once: half removed, it would not be known as ours
            shutil.rmtree(self._removed)
        require_space(self._root, needed_gb)
        self._directory.mkdir()
        self._log.touch()
        return None

    def _run(self, what: str, lock_descriptor: int, *arguments: str) -> None:
        started_s = time.monotonic()
        # -I: neither PYTHONPATH nor packages of the user's count as installed.
        command = [str(self._python), "-I", "-m", *arguments]
        before = self._log.stat().st_size
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self._root, pass_fds=[lock_descriptor]
            )
            try:
                while not ended_within(process, PROGRESS_EVERY_S):
                    print(f"  {what}: {self._progress(before)}, {time.monotonic() - started_s:.0f} s", flush=True)
            finally:
                process.terminate()  # only where something interrupts the wait: else it has ended
                process.wait()
        if process.returncode != 0:
            text = self._written_since(before)
            tail = "\n".join(text.splitlines()[-LOG_LINES_SHOWN:])
            raise InstallError(f"installing {what} failed; the end of {self._log}:\n{tail}\n\n{advice(text)}")
        print(f"  {what}: done, {time.monotonic() - started_s:.0f} s", flush=True)

    def _written_since(self, position: int) -> str:
        with self._log.open("rb") as log:
            log.seek(position)
            return log.read().decode(errors="replace")

    def _progress(self, position: int) -> str:
        text = self._written_since(position)
        if "Installing collected packages" in text:
            return "unpacking"
        return f"{text.count('Collecting ')} found"


def ended_within(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def install(arguments: argparse.Namespace) -> None:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        raise InstallError(f"Python 3.11 or newer is needed, this is {found}; run: make PYTHON=/path/to/python3.11 ...")
    options = remembered(ROOT / ".venv.options", set(arguments.options))
    gpu = "cpu" not in options and has_nvidia_gpu()
    lock = lock_file(platform.system(), platform.machine(), gpu=gpu)
    requirements = requirements_of(lock, allow_cuda_torch="allow-cuda-torch" in options)
    stamp = stamp_of(requirements)
    installer = Installer(ROOT)
    if installer.is_done(stamp):
        return
    with one_at_a_time(ROOT / ".venv.lock") as lock_descriptor:
        if installer.is_done(stamp):  # by the one waited for
            return
        print(f"platform: {lock.stem}{'' if gpu else ' (no NVIDIA GPU found, or not wanted)'}, Python {found}")
        needed_gb = CPU_GB if LOCKED_TORCH in requirements else CUDA_GB
        installer.run(requirements, stamp, needed_gb=needed_gb, lock_descriptor=lock_descriptor)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, epilog="Options are remembered until make clean.")
    for name, what in OPTIONS.items():
        parser.add_argument(f"--{name}", dest="options", action="append_const", const=name, default=[], help=what)
    try:
        install(parser.parse_args())
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run it again to begin anew", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
