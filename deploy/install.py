"""Creates .venv and installs what the lock file of this platform lists. Run by `make`; needs Python 3.11+ alone.

Running it again is quick: a stamp in .venv says what was installed. An interrupted installation is begun anew.
"""

import argparse
import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
LOCKED_TORCH = "torch==2.13.0+cpu"
CUDA_TORCH = "torch==2.13.0"  # runs on a CPU as well, but brings gigabytes of CUDA libraries
LOG_LINES_SHOWN = 15


class InstallError(Exception):
    """What went wrong, and what to do."""


def has_nvidia_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    return command is not None and subprocess.run([command, "-L"], capture_output=True, check=False).returncode == 0


def lock_file(system: str, machine: str, *, gpu: bool) -> Path:
    """The lock file of a platform; raises InstallError when there is none."""
    path = ROOT / "deploy" / "requirements" / f"{system.lower()}-{machine}-{'gpu' if gpu else 'cpu'}.txt"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in path.parent.glob("*.txt")))
        raise InstallError(f"there is no lock file for {path.stem}; there are: {known}")
    return path


def requirements_of(lock: Path, *, allow_cuda_torch: bool) -> list[str]:
    lines = [line.strip() for line in lock.read_text().splitlines()]
    wanted = [line for line in lines if line and not line.startswith("#")]
    return [CUDA_TORCH if allow_cuda_torch and line == LOCKED_TORCH else line for line in wanted]


def stamp_of(requirements: Sequence[str], root: Path = ROOT) -> str:
    """Digest of all that decides what an installation consists of, and of where it lies."""
    digest = hashlib.sha256()
    for part in (*requirements, sys.version, str(root), (root / "pyproject.toml").read_text()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def advice(log: str) -> str:
    """What to do about a failed pip, from what it printed."""
    if LOCKED_TORCH in log and ("No matching distribution" in log or "Could not find a version" in log):
        return (
            f"Your package index does not have {LOCKED_TORCH}, the CPU build of PyTorch. Point pip at one that has "
            "it (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS), or run: python3 deploy/install.py --allow-cuda-torch\n"
            "which takes the much larger CUDA build instead."
        )
    if "No matching distribution" in log or "Could not find a version" in log:
        return "Your package index lacks a locked version. Is it reachable, and complete? Try: pip download msgspec"
    if "No space left" in log:
        return "The disk is full: about 6 GB are needed."
    return "Run make again: what was downloaded already is not downloaded twice."


class Installer:
    """Installs into root/.venv."""

    def __init__(self, root: Path) -> None:
        self._directory = root / ".venv"
        self._root = root
        self._python = self._directory / "bin" / "python"
        self._stamp = self._directory / "installed"
        self._log = self._directory / "install.log"

    def is_done(self, stamp: str) -> bool:
        return self._stamp.exists() and self._stamp.read_text() == stamp and self._python.exists()

    def run(self, requirements: Sequence[str], stamp: str) -> None:
        started_s = time.monotonic()
        print(f"installing {len(requirements)} locked packages into {self._directory} (some minutes, about 4 GB)")
        if self._directory.exists() and not self._stamp.exists():
            print("  an interrupted installation is removed first")
            shutil.rmtree(self._directory)
        self._stamp.unlink(missing_ok=True)
        venv.create(self._directory, with_pip=True, symlinks=True)
        listed = self._directory / "requirements.txt"
        listed.write_text("\n".join(requirements) + "\n")
        self._pip("packages", "install", "--no-deps", "-r", str(listed))
        self._pip("this project", "install", "--no-deps", "--no-build-isolation", "-e", str(self._root))
        self._stamp.write_text(stamp)
        print(f"installed in {time.monotonic() - started_s:.0f} s")

    def _pip(self, what: str, *arguments: str) -> None:
        print(f"  {what} ...", flush=True)
        command = [str(self._python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        with self._log.open("a") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=self._root, check=False).returncode
        if code != 0:
            text = self._log.read_text(errors="replace")
            tail = "\n".join(text.splitlines()[-LOG_LINES_SHOWN:])
            raise InstallError(f"installing {what} failed; the end of {self._log}:\n{tail}\n\n{advice(text)}")


def install(arguments: argparse.Namespace) -> None:
    if sys.version_info < MIN_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        raise InstallError(f"Python 3.11 or newer is needed, this is {found}; run: make PYTHON=/path/to/python3.11 ...")
    gpu = has_nvidia_gpu() and not arguments.cpu
    lock = lock_file(platform.system(), platform.machine(), gpu=gpu)
    requirements = requirements_of(lock, allow_cuda_torch=arguments.allow_cuda_torch)
    stamp = stamp_of(requirements)
    with (ROOT / ".venv.lock").open("w") as only_one:
        fcntl.flock(only_one, fcntl.LOCK_EX)  # a second `make` waits here, and then finds it done
        installer = Installer(ROOT)
        if not installer.is_done(stamp):
            print(f"platform: {lock.stem}{'' if gpu else ' (no NVIDIA GPU found)'}")
            installer.run(requirements, stamp)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="install for the CPU even where there is a GPU")
    parser.add_argument("--allow-cuda-torch", action="store_true", help=f"take {CUDA_TORCH} for {LOCKED_TORCH}")
    try:
        install(parser.parse_args())
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
