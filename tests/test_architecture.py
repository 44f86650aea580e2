"""The rules of the house that a reader relies on, checked on the source itself."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "learner", "rollout_server", "deploy")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MAX_FUNCTION_LINES = 50
DOORS = {
    "zmq": {f"common/wire/{name}.py" for name in ("foreign", "lifeline", "opening", "options", "sockets", "watch")},
    "vllm": {f"rollout_server/vllm_{name}.py" for name in ("adapters", "requests", "start", "tools", "worker")},
    "deepspeed": {"learner/deepspeed_engine.py"},
    "peft": {"learner/lora.py"},
    "httpx": {"rollout_server/environments/http_server.py"},
    "websockets": {"rollout_server/environments/openenv_session.py"},
    "starlette": {"rollout_server/gateway/routes.py"},
    "uvicorn": {"rollout_server/gateway/listening.py"},
}
WAITED_FOR_TO_ITS_END = {  # a shielded task that its own function awaits, also when cancelled: never an orphan
    "learner/loop.py": "finish",
    "rollout_server/vllm_engine.py": "open_vllm_engine",
}
EXECUTES_WHAT_IT_READS = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def imported_packages(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Top-level names of all imports, those inside functions and by importlib included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node, (node.module or "").partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"import_module", "importlib.import_module"}:
            yield from ((node, str(arg.value).partition(".")[0]) for arg in node.args if isinstance(arg, ast.Constant))


def makes_an_orphan_task(call: ast.Call) -> bool:
    """A task that no TaskGroup owns: asyncio's own functions, or an event loop's method."""
    name = ast.unparse(call.func)
    if name.rpartition(".")[2] in {"ensure_future", "run_coroutine_threadsafe"} or name == "create_task":
        return True
    if not isinstance(call.func, ast.Attribute) or call.func.attr != "create_task":
        return False
    owner = name.removesuffix(".create_task")
    return owner == "asyncio" or owner.endswith(("loop", "loop()"))


def test_the_sources_were_found():
    assert len(SOURCES) > 50


def test_common_is_this_repositorys_and_not_another_package_of_that_name():
    assert Path(common.__file__).resolve() == ROOT / "common" / "__init__.py"
    assert [Path(path).resolve() for path in common.__path__] == [ROOT / "common"]


def test_every_package_is_installed():
    """setuptools takes only what pyproject.toml lists: a forgotten one is missing from an image."""
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    present = {".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert present == listed


@pytest.mark.parametrize("package", DOORS)
def test_a_heavy_library_enters_through_its_own_door_alone(package):
    importers = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        for _, name in imported_packages(parsed(path))
        if name == package
    }
    assert importers == DOORS[package]


def test_nothing_that_executes_what_it_reads_is_imported():
    found = [
        place(path, node)
        for path in SOURCES
        for node, name in imported_packages(parsed(path))
        if name in EXECUTES_WHAT_IT_READS
    ]
    assert found == []


def orphan_tasks(path: Path) -> list[str]:
    tree = parsed(path)
    waiting = WAITED_FOR_TO_ITS_END.get(str(path.relative_to(ROOT)))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.AsyncFunctionDef) and node.name == waiting)
    exempt = {id(inner) for function in functions for inner in ast.walk(function)}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in exempt)
    return [place(path, call) for call in calls if makes_an_orphan_task(call)]


def test_every_task_belongs_to_a_task_group():
    assert [task for path in SOURCES for task in orphan_tasks(path)] == []


@pytest.mark.parametrize(
    ("source", "orphan"),
    [
        ("asyncio.create_task(work())", True),
        ("asyncio.get_running_loop().create_task(work())", True),
        ("self._loop.create_task(work())", True),
        ("create_task(work())", True),
        ("asyncio.ensure_future(work())", True),
        ("tasks.create_task(work())", False),
        ("self._tasks.create_task(work())", False),
    ],
)
def test_an_orphan_task_is_recognised(source, orphan):
    assert makes_an_orphan_task(ast.parse(source, mode="eval").body) == orphan


def test_no_function_is_longer_than_a_screen():
    functions = (
        (path, node)
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    long = [
        f"{place(path, node)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path, node in functions
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_the_import_contracts_hold():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
