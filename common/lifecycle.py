"""What every process of ours does alike: logging, signals, child processes, one thread for blocking work."""

import asyncio
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TextIO, TypeVar

import uvloop

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

STOP_GRACE_S = 3.0
EXIT_FAILURE = 1
EXIT_USER_ERROR = 2

_PR_SET_PDEATHSIG = 1
_PARENT_VARIABLE = "COUNTERCURRENT_PARENT"  # process id, told to a child and taken out by it


class UserError(Exception):
    """Something a person must change: shown as one sentence, without a traceback."""


class _StandardError(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at that moment: a live display puts itself there to keep lines apart."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def configure_logging(role: str) -> None:
    """Lines like `12:30:05 learner  waiting for ...`, in UTC, on standard error."""
    formatter = logging.Formatter(f"%(asctime)s {role:<14} %(message)s", datefmt="%H:%M:%S")
    formatter.converter = time.gmtime
    handler = _StandardError()
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def run_until_stopped(main: Callable[[], Coroutine[Any, Any, int]]) -> int:
    """Run main on uvloop and return the process's exit code.

    SIGINT or SIGTERM cancels main: the same path as a crash, so cleanup lives in `finally`. A second SIGINT ends the
    process at once. Returns main's own code, 128 + signal when stopped by one, 2 for a UserError, 1 for a crash.
    A process started by ChildProcess is stopped by SIGTERM when its parent is gone, however that ended.
    """
    if (parent_pid := os.environ.get(_PARENT_VARIABLE)) is not None:
        die_with_parent(int(parent_pid), signal.SIGTERM)
    received: list[signal.Signals] = []
    os.register_at_fork(after_in_child=_forget_signal_handling)
    try:
        return uvloop.run(_cancel_on_signal(main, received))
    except asyncio.CancelledError:
        return 128 + received[0] if received else EXIT_FAILURE
    except Exception as error:
        mistakes = _user_errors(error)
        for mistake in mistakes:
            logger.error("%s", mistake)  # noqa: TRY400 - the sentence is all there is to know
        if not mistakes:
            logger.critical("stopped by an unexpected error", exc_info=error)
        return EXIT_USER_ERROR if mistakes else EXIT_FAILURE


def leave(code: int) -> NoReturn:
    """End the process at once. With torch and vLLM in it, taking the interpreter apart lasts for seconds."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _cancel_on_signal(main: Callable[[], Coroutine[Any, Any, int]], received: list[signal.Signals]) -> int:
    task = asyncio.current_task()
    assert task is not None

    def stop(received_signal: signal.Signals) -> None:
        if received and received_signal == signal.SIGINT:
            os._exit(128 + received_signal)
        received.append(received_signal)
        if len(received) == 1:
            logger.info("stopping on %s", received_signal.name)
            task.cancel()

    for watched in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(watched, stop, watched)
    return await main()


def _forget_signal_handling() -> None:
    """A forked child shares the pipe that wakes this event loop: without this, its signals would be taken for ours."""
    signal.set_wakeup_fd(-1)
    for watched in (signal.SIGINT, signal.SIGTERM):
        signal.signal(watched, signal.SIG_DFL)


def _user_errors(error: BaseException) -> list[UserError]:
    """The UserErrors in an error or a group of errors; none if anything else is among them."""
    if isinstance(error, UserError):
        return [error]
    if not isinstance(error, BaseExceptionGroup):
        return []
    found = [_user_errors(inner) for inner in error.exceptions]
    return [mistake for mistakes in found for mistake in mistakes] if all(found) else []


def die_with_parent(parent_pid: int, with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent dies, however the parent dies.

    parent_pid: as the parent said; a parent that died before this call is noticed. The kernel watches the thread that
    started this process: ours start children from the thread of the event loop only. Raises OSError.
    """
    os.environ.pop(_PARENT_VARIABLE, None)  # the children of this process have another parent
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, with_signal, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot ask the kernel to be told of the parent's death")
    if os.getppid() != parent_pid:
        sys.exit(f"the parent process {parent_pid} is gone")


def ending_with_parent() -> dict[str, str]:
    """Environment of a child that is told to end when this process dies, if it is one of ours: run_until_stopped()."""
    return {_PARENT_VARIABLE: str(os.getpid())}


class ChildProcess:
    """A process that ends no later than the block that started it.

    It gets a session of its own: Ctrl-C in a terminal reaches the parent alone, which stops its children in order.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait(self) -> int:
        """Exit code; negative for a signal."""
        return await self._process.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, then SIGKILL to its whole process group: after grace_s, or at once when cancelled meanwhile."""
        try:
            if self._process.returncode is None:
                with suppress(ProcessLookupError):
                    self._process.terminate()
                with suppress(TimeoutError):
                    async with asyncio.timeout(grace_s):
                        await self._process.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    @classmethod
    @asynccontextmanager
    async def run_module(
        cls,
        module: str,
        *arguments: str,
        output: Path | None = None,
        pass_fds: Sequence[int] = (),
        environment: dict[str, str] | None = None,
        grace_s: float = STOP_GRACE_S,
    ) -> AsyncIterator["ChildProcess"]:
        """`python -m module arguments...`; standard output and error go to `output` (appended) if given.

        grace_s: how long it may take to end by itself, 0 for one that has nothing to put in order.
        """
        target = output.open("ab") if output is not None else None
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                module,
                *arguments,
                stdin=subprocess.DEVNULL,
                stdout=target,
                stderr=target,
                pass_fds=pass_fds,
                start_new_session=True,
                env={**os.environ, **ending_with_parent(), **(environment or {})},
            )
        finally:
            if target is not None:
                target.close()
        child = cls(process)
        try:
            yield child
        finally:
            await child.stop(grace_s)


class DedicatedThread:
    """One thread for blocking calls that must not hop between threads (the current CUDA device is per thread)."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Calls run one after the other; cancelling the wait does not stop a call that has begun."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Waits for the call that is running."""
        self._executor.shutdown()
