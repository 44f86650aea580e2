"""Break one guard after the other in a copy of the code, and see a test fail: python -m tests.mutations [WORD]."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutations import GUARDS
from tests.mutations.guard import ROOT, Guard

COPIED = ("common", "learner", "rollout_server", "deploy", "tests", "pyproject.toml")
TEST_TIMEOUT_S = 300


def is_noticed(guard: Guard) -> bool:
    """Whether its test passes with the guard, and fails without."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory)
        for name in COPIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        if not _passes(guard.test, copy):
            raise RuntimeError(f"{guard.test} fails with the guard in its place")
        guard.break_in(copy)
        return not _passes(guard.test, copy)


def _passes(test: str, root: Path) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{test}"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TEST_TIMEOUT_S, check=False)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{test} was not run:\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("word", nargs="?", default="", help="only guards with this word in their file or sentence")
    word = parser.parse_args().word
    chosen = [guard for guard in GUARDS if word in guard.file or word in guard.missing]
    unnoticed = 0
    for guard in chosen:
        noticed = is_noticed(guard)
        unnoticed += not noticed
        print(f"{'noticed' if noticed else 'UNNOTICED':<10} {guard.file}: {guard}", flush=True)
    print(f"{len(chosen)} guards, {unnoticed} that nobody would miss")
    return 1 if unnoticed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
