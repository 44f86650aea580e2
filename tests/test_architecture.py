"""Rules of the house that no linter knows."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "deploy", "learner", "rollout_server")
MAX_FUNCTION_LINES = 50
MAX_FILE_LINES = 300
CATALOGUES = {"messages.py"}  # one small declaration after the other: splitting it would hide the protocol

# A library enters through these files and no others.
DOORS = {
    "zmq": ("common/wire/",),
    "vllm": ("rollout_server/vllm_",),
    "deepspeed": ("learner/deepspeed_engine.py",),
}


def sources() -> Iterator[Path]:
    for package in PACKAGES:
        yield from sorted((ROOT / package).rglob("*.py"))


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_the_package_common_is_ours():
    assert Path(common.__file__).is_relative_to(ROOT)


@pytest.mark.parametrize("library", DOORS)
def test_a_heavy_library_enters_through_one_door(library: str):
    importers = [path.relative_to(ROOT).as_posix() for path in sources() if library in imported_by(path)]
    assert importers
    assert [name for name in importers if not name.startswith(DOORS[library])] == []


def test_nothing_that_executes_what_it_reads_is_imported():
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert {path.name: found for path in sources() if (found := imported_by(path) & forbidden)} == {}


def test_functions_fit_on_a_page():
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno}": node.end_lineno - node.lineno + 1
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


def test_files_stay_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in sources() if path.name not in CATALOGUES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_every_task_belongs_to_a_task_group():
    orphans = [path.name for path in sources() if re.search(r"\basyncio\.create_task\(", path.read_text())]
    assert orphans == []


def test_no_work_is_left_as_a_note():
    notes = [path.name for path in sources() if re.search(r"\b(TODO|FIXME|XXX)\b", path.read_text())]
    assert notes == []
