"""`python -m tests.environments`: tests against the real servers, each installed into a virtual environment of its own.

The servers cannot be installed beside vLLM. What each needs is pinned in requirements-NAME.txt; .venv-environments/NAME
is made from it, anew whenever the file changes.
"""

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSTALLED = ROOT / ".venv-environments"
SWITCH = "COUNTERCURRENT_TEST_ENVIRONMENTS"  # set: the tests run, and are not skipped


def python_of(name: str) -> Path:
    return INSTALLED / name / "bin" / "python"


def install(requirements: Path) -> None:
    name = requirements.stem.removeprefix("requirements-")
    stamp = INSTALLED / name / "installed"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(f"installing {name} into {INSTALLED / name}", flush=True)  # noqa: T201 - a command
    venv.create(INSTALLED / name, with_pip=True, clear=True)
    subprocess.run([python_of(name), "-m", "pip", "install", "--quiet", "-r", requirements], check=True)
    stamp.write_text(digest)


def main() -> int:
    for requirements in sorted(HERE.glob("requirements-*.txt")):
        install(requirements)
    tests = [sys.executable, "-m", "pytest", str(HERE), *sys.argv[1:]]
    return subprocess.run(tests, env=os.environ | {SWITCH: "1"}, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
