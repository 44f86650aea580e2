"""`python -m tests.environments`: tests against the real servers, each installed into a virtual environment of its own.

The servers cannot be installed beside vLLM. What each needs is pinned in requirements-NAME.txt; .venv-environments/NAME
is made from it, anew whenever the file changes. `--install NAME ...` does that alone.
"""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSTALLED = ROOT / ".venv-environments"
NEMO_GYM = "nemo-gym"
NEEDS = {NEMO_GYM: (3, 13)}  # more than this project's own Python


def python_of(name: str) -> Path:
    """Raises FileNotFoundError, saying what to do, where the server is not installed."""
    python = INSTALLED / name / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"{name} is not installed: run make test-environments")
    return python


def python_for(name: str) -> str | None:
    """The interpreter that the server is to run on; None where there is none."""
    needed = NEEDS.get(name)
    if needed is None or sys.version_info >= needed:
        return sys.executable
    own = sorted((Path.home() / ".pyenv" / "versions").glob("3.1[34]*/bin/python"))
    for candidate in ("python3.14", "python3.13", *map(str, own)):
        path = shutil.which(candidate)
        if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
            return path
    return None


def install(name: str) -> None:
    python = python_for(name)
    assert python is not None
    requirements = HERE / f"requirements-{name}.txt"
    place = INSTALLED / name
    stamp = place / "installed"
    version = subprocess.run([python, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(requirements.read_bytes() + version).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(f"installing {name} into {place}", flush=True)  # noqa: T201 - a command
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([python, "-m", "venv", place], check=True)
    # NeMo Gym wants 3.13.14 for fixes that these tests do not need; 3.13.0 runs them.
    arguments = ["--quiet", "--no-deps", "--ignore-requires-python", "-r", str(requirements)]
    subprocess.run([place / "bin" / "python", "-m", "pip", "install", *arguments], check=True)
    stamp.write_text(digest)


def main() -> int:
    names = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))
    if sys.argv[1:2] == ["--install"]:
        names = sys.argv[2:]
    runnable = [name for name in names if python_for(name)]
    for name in runnable:
        install(name)
    if sys.argv[1:2] == ["--install"]:
        return 0
    tests = [sys.executable, "-m", "pytest", str(HERE), "--durations=15", *sys.argv[1:]]
    if NEMO_GYM not in runnable:
        tests += ["-m", "not nemo_gym"]
        print("NeMo Gym needs Python 3.13, which is not here: its tests are left out")  # noqa: T201 - a command
    return subprocess.run(tests, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
