"""Signals, exit codes and children, on real processes: each test runs a small program and watches it from outside."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import pytest

from common.lifecycle import ChildProcess, DedicatedThread

PATIENCE_S = 20.0
ROOT = Path(__file__).parents[2]
SLEEP_FOREVER = "await asyncio.Event().wait()"
IGNORE_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def a_program(main: str, *, before: str = "") -> str:
    """Runs `main` (the lines of an async function) until stopped."""
    body = "\n".join("    " + line for line in main.strip().splitlines())
    return f"""
import asyncio, os, signal, subprocess, sys
from common.lifecycle import ChildProcess, UserError, configure_logging, die_with_parent, run_until_stopped
{before}
async def main():
{body}
    return 0
configure_logging("test")
sys.exit(run_until_stopped(main))
"""


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    """The program as a process of its own session, all of which is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def says(process: subprocess.Popen[str]) -> str:
    """Its next line of output."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def ending(program: str) -> tuple[int, str]:
    """Exit code and standard error of a program that ends by itself."""
    with running(program) as process:
        _, errors = process.communicate(timeout=PATIENCE_S)
    return process.returncode, errors


async def is_gone(pid: int) -> bool:
    """Whether the process ends within our patience; a zombie has ended."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while not _has_ended(pid):
                await asyncio.sleep(0.02)
    return _has_ended(pid)


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def test_a_process_ends_with_the_code_its_main_returns():
    assert ending(a_program("return 7"))[0] == 7


def test_an_unexpected_error_is_logged_with_its_traceback_and_gives_1():
    code, errors = ending(a_program("raise KeyError('lost')"))
    assert code == 1
    assert "stopped by an unexpected error" in errors
    assert "KeyError: 'lost'" in errors


@pytest.mark.parametrize(
    "error",
    [
        "UserError('no such model; give --model')",
        "ExceptionGroup('tasks', [ExceptionGroup('inner', [UserError('no such model; give --model')])])",
    ],
)
def test_a_mistake_of_the_user_is_one_sentence_and_gives_2(error: str):
    code, errors = ending(a_program(f"raise {error}"))
    assert code == 2
    [line] = errors.splitlines()
    assert line.endswith("no such model; give --model")


def test_a_mistake_of_the_user_does_not_hide_an_unexpected_error_beside_it():
    code, errors = ending(a_program("raise ExceptionGroup('tasks', [UserError('typo'), KeyError('lost')])"))
    assert code == 1
    assert "KeyError: 'lost'" in errors


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_main_which_cleans_up_before_the_process_ends(which: signal.Signals):
    main = f"""
try:
    print("ready", flush=True)
    {SLEEP_FOREVER}
finally:
    await asyncio.sleep(0.01)
    print("cleaned up", flush=True)
"""
    with running(a_program(main)) as process:
        assert says(process) == "ready"
        process.send_signal(which)
        output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + which
    assert output.strip() == "cleaned up"
    assert f"stopping on {which.name}" in errors


SLOW_CLEANUP = f"""
try:
    print("ready", flush=True)
    {SLEEP_FOREVER}
finally:
    print("cleaning up", flush=True)
    await asyncio.sleep(%s)
    print("cleaned up", flush=True)
"""


def test_a_second_ctrl_c_ends_the_process_at_once():
    with running(a_program(SLOW_CLEANUP % 1000)) as process:
        assert says(process) == "ready"
        process.send_signal(signal.SIGINT)
        assert says(process) == "cleaning up"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGINT
    assert output == ""


def test_a_second_sigterm_does_not_disturb_the_cleanup():
    with running(a_program(SLOW_CLEANUP % 0.2)) as process:
        assert says(process) == "ready"
        process.send_signal(signal.SIGTERM)
        assert says(process) == "cleaning up"
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert output.strip() == "cleaned up"


def test_a_forked_child_is_ended_by_sigterm_and_its_parent_does_not_take_the_signal_for_its_own():
    main = """
pid = os.fork()
if pid == 0:
    print("ready", flush=True)
    signal.pause()
    os._exit(9)
await asyncio.to_thread(sys.stdin.readline)
os.kill(pid, signal.SIGTERM)
_, status = await asyncio.to_thread(os.waitpid, pid, 0)
await asyncio.sleep(0.1)
return os.WTERMSIG(status)
"""
    with running(a_program(main)) as process:
        assert says(process) == "ready"
        _, errors = process.communicate("go\n", timeout=PATIENCE_S)
    assert process.returncode == signal.SIGTERM, errors
    assert "stopping" not in errors


async def test_a_child_of_child_process_ends_when_its_parent_is_killed(tmp_path: Path):
    """The parent has no chance to stop it; the child is stopped as by SIGTERM, and cleans up."""
    (tmp_path / "child.py").write_text(a_program(SLOW_CLEANUP % 0.01))
    main = f"""
async with ChildProcess.run_module("child") as child:
    print(child.pid, flush=True)
    {SLEEP_FOREVER}
"""
    with running(a_program(main, before=f"os.environ['PYTHONPATH'] = '{ROOT}:{tmp_path}'")) as process:
        pid = int(says(process))
        assert says(process) == "ready"
        process.kill()
        assert [says(process), says(process)] == ["cleaning up", "cleaned up"]
    assert await is_gone(pid)


def test_the_children_of_a_child_are_not_told_of_its_parent(tmp_path: Path):
    program = a_program("assert 'COUNTERCURRENT_PARENT' not in os.environ")
    (tmp_path / "child.py").write_text(program)
    main = "async with ChildProcess.run_module('child') as child:\n    return await child.wait()"
    assert ending(a_program(main, before=f"os.environ['PYTHONPATH'] = '{ROOT}:{tmp_path}'")) == (0, "")


def test_a_child_whose_parent_died_before_it_could_ask_ends_at_once():
    code, errors = ending(a_program("return 0", before="die_with_parent(1 << 30)"))
    assert code == 1
    assert errors.strip() == f"the parent process {1 << 30} is gone"


@pytest.fixture
def module_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose programs can be run as modules."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    return tmp_path


@asynccontextmanager
async def a_child(directory: Path, program: str) -> AsyncIterator[tuple[ChildProcess, Path]]:
    """A child process that has said its first words, and the file with all it says."""
    (directory / "child.py").write_text(program)
    log = directory / "log.txt"
    async with asyncio.timeout(PATIENCE_S), ChildProcess.run_module("child", output=log) as child:
        while not log.read_text():
            await asyncio.sleep(0.02)
        yield child, log


async def test_leaving_the_block_stops_the_child_by_sigterm(module_path: Path):
    async with a_child(module_path, a_program(SLOW_CLEANUP % 0.01)) as (child, log):
        pass
    assert await child.wait() == 128 + signal.SIGTERM
    assert log.read_text().split("\n")[-2] == "cleaned up"


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(module_path: Path):
    program = "import signal\n" + IGNORE_SIGTERM + "\nprint('ready', flush=True)\nwhile True: signal.pause()"
    async with a_child(module_path, program) as (child, _):
        await child.stop(grace_s=0.1)
        assert await child.wait() == -signal.SIGKILL


async def test_a_stop_that_is_cancelled_kills_at_once(module_path: Path):
    program = "import signal\n" + IGNORE_SIGTERM + "\nprint('ready', flush=True)\nwhile True: signal.pause()"
    async with a_child(module_path, program) as (child, _):
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await child.stop(grace_s=1000.0)
        assert await child.wait() == -signal.SIGKILL


async def test_what_a_child_started_and_left_behind_ends_with_it(module_path: Path):
    program = "import subprocess\nprint(subprocess.Popen(['sleep', '1000']).pid, flush=True)"
    async with a_child(module_path, program) as (child, log):
        grandchild = int(log.read_text())
        assert await child.wait() == 0
        assert not _has_ended(grandchild)
    assert await is_gone(grandchild)


async def test_ctrl_c_in_the_terminal_of_the_parent_does_not_reach_the_child(module_path: Path):
    program = "import os\nprint(os.getsid(0), os.getpgrp(), os.getpid(), flush=True)"
    async with a_child(module_path, program) as (child, log):
        await child.wait()
        assert log.read_text().split() == [str(child.pid)] * 3


async def test_a_dedicated_thread_runs_all_calls_on_one_thread_one_after_the_other():
    thread = DedicatedThread("training")
    try:
        async with asyncio.TaskGroup() as tasks:
            calls = [tasks.create_task(thread.run(threading.current_thread)) for _ in range(8)]
        [name] = {call.result().name for call in calls}
        assert name.startswith("training")
    finally:
        thread.close()


async def test_an_error_in_a_dedicated_thread_reaches_whoever_waits():
    thread = DedicatedThread("training")
    try:
        with pytest.raises(ZeroDivisionError):
            await thread.run(lambda: 1 / 0)
    finally:
        thread.close()


def test_log_lines_carry_utc_time_and_role_and_follow_standard_error():
    program = """
import io, logging, sys, time
from common.lifecycle import configure_logging
configure_logging("learner")
sys.stderr = display = io.StringIO()
earlier = time.strftime("%H:%M:%S", time.gmtime())
logging.getLogger("x").info("waiting for %s", "a server")
print(earlier, display.getvalue(), time.strftime("%H:%M:%S", time.gmtime()), end="")
"""
    environment = {**os.environ, "TZ": "ELSEWHERE-9"}
    output = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, env=environment, text=True, capture_output=True, timeout=PATIENCE_S, check=True,
    ).stdout  # fmt: skip
    earlier, said_at, role, *message, later = output.split()
    assert said_at in (earlier, later)
    assert (role, message) == ("learner", ["waiting", "for", "a", "server"])
