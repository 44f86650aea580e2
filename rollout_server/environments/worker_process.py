"""WorkerProcess: a reward worker as its parent sees it, from start to death."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, cast

import msgspec

from common.environments import EnvironmentSettings
from rollout_server.environments.environment import EnvironmentFailure, EnvironmentStartError
from rollout_server.environments.frames import Call, FrameBuffer, FrameError, Hello, Outcome, pack

REPLY_SLACK_BYTES = 1 << 16  # beside the observation
PIPELINE_CALLS = 8  # at most so many are sent ahead to a worker that runs one call at a time,
PIPELINE_S = 0.002  # and no more than it answers in this time: those behind a slow call would wait for it in vain
CONCURRENT_CALLS = 256  # sent to a worker that runs them all at once
STALL_GRACE_S = 1.0  # a concurrent worker ends its late calls itself; if not even that happens, its loop is blocked
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_STANDARD_ERROR = 2
_NO_HELLO = "it did not survive its import"

_decode_hello = msgspec.json.Decoder(Hello).decode
_decode_outcome = msgspec.json.Decoder(Outcome).decode


@dataclass(slots=True, eq=False)
class PendingCall:
    """A call and who waits for its outcome, which is no failure."""

    call: Call
    outcome: asyncio.Future[Outcome]
    started_at: float = 0.0  # of the event loop's clock
    worker: "WorkerProcess | None" = None  # that it was sent to

    def fail(self, failure: EnvironmentFailure) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(failure)


@dataclass(frozen=True, slots=True)
class WorkerCode:
    """What a worker runs: module.name, or what module.name(*arguments) returns."""

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    title: str = ""  # for people

    def __str__(self) -> str:
        return self.title or f"python:{self.module}:{self.name}"


class WorkerProcess(asyncio.Protocol):
    """Sends calls to one process and settles them from its answers; kills it when one takes too long.

    A worker that runs one call at a time tells by its answers which call it is at, so that its death is blamed on
    that call alone. Calls of a concurrent worker share its fate.
    """

    def __init__(self, process: Process, settings: EnvironmentSettings, on_progress: Callable[[], None]) -> None:
        self._process = process
        self._settings = settings
        self._on_progress = on_progress
        self._frames = FrameBuffer(settings.max_reply_bytes + REPLY_SLACK_BYTES)
        self._in_flight: dict[int, PendingCall] = {}  # in the order sent
        self._call_s = PIPELINE_S  # moving average of what one call takes
        self._loop = asyncio.get_running_loop()
        self._hello: asyncio.Future[Hello] = self._loop.create_future()
        self._disconnected = asyncio.Event()
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._killed = False
        self._late = False
        self._concurrent = False
        self.has_episodes = False
        self.num_episodes = 0
        self._fault = ""

    def __repr__(self) -> str:
        return f"<WorkerProcess {self._process.pid}, {len(self._in_flight)} calls in flight>"

    @classmethod
    async def start(cls, code: WorkerCode, settings: EnvironmentSettings, on_progress: Callable[[], None]) -> Self:
        """Raises EnvironmentStartError unless the function can be called within settings.start_timeout_s."""
        ours, theirs = socket.socketpair()
        with theirs, contextlib.ExitStack() as unless_spawned:
            unless_spawned.callback(ours.close)
            process = await _spawn(theirs, code, settings)
            unless_spawned.pop_all()
        worker = cls(process, settings, on_progress)
        error: str | None = None
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: worker, sock=ours)
            error = await worker._greeting()
        finally:
            if error != "":
                worker.kill()
                await worker.death()
        if error == _NO_HELLO:
            error += f" ({worker.cause_of_death})"
        if error:
            places = f"modules are looked up from {os.getcwd()} and PYTHONPATH"
            if code.arguments:
                places = f"paths are looked up from {os.getcwd()}"
            raise EnvironmentStartError(f"environment {code} cannot be used: {error} ({places})")
        return worker

    async def _greeting(self) -> str:
        """Waits for the worker's first frame; returns what is wrong, or nothing."""
        try:
            async with asyncio.timeout(self._settings.start_timeout_s):
                hello = await self._hello
        except TimeoutError:
            return f"its import took longer than {self._settings.start_timeout_s:g} s"
        self._concurrent, self.has_episodes = hello.concurrent, hello.has_episodes
        return hello.error

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def has_room_beside(self, num_calls: int) -> bool:
        """Whether one more call may be sent besides `num_calls` that are about to be."""
        one_by_one = max(1, min(PIPELINE_CALLS, int(PIPELINE_S / max(self._call_s, 1e-6))))
        most = CONCURRENT_CALLS if self._concurrent else one_by_one
        return not self._killed and len(self._in_flight) + num_calls < most

    def send(self, batch: list[PendingCall]) -> None:
        now = self._loop.time()
        idle = not self._in_flight
        for pending in batch:
            pending.started_at, pending.worker = now, self
            self._in_flight[pending.call.call_id] = pending
        if self._transport is not None:
            self._transport.write(pack([pending.call for pending in batch]))
        if idle:
            self._watch_oldest()

    @property
    def is_dying(self) -> bool:
        return self._killed

    def end_episode(self, episode_id: int) -> None:
        """Not answered: it may wait behind other calls, or the process be gone."""
        if self._transport is not None and not self._killed:
            close = Call(-1, "", "", msgspec.Raw(b"null"), verb="close", episode_id=episode_id)
            self._transport.write(pack([close]))

    def kill(self) -> None:
        """End the process and all that it started."""
        self._killed = True
        # Its own session, so the group is its own; members may outlive it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def death(self) -> list[PendingCall]:
        """Waits until the process is gone; fails the calls it may have died of and returns those it never started."""
        try:
            await self._process.wait()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # answers sent before the death may still be on their way
                    await self._disconnected.wait()
        finally:
            self.kill()
            self._stop_watching()
            if self._transport is not None:
                self._transport.abort()
        failure = EnvironmentFailure("environment_timeout" if self._late else "environment_error", self.cause_of_death)
        suspects = list(self._in_flight.values())
        unstarted = [] if self._concurrent else suspects[1:]
        for pending in suspects[: len(suspects) - len(unstarted)]:
            pending.fail(failure)
        self._in_flight.clear()
        return unstarted

    @property
    def cause_of_death(self) -> str:
        if self._late:
            return f"no answer within {self._settings.step_timeout_s:g} s; the worker was killed and is replaced"
        if self._fault:
            return f"the worker process was killed: {self._fault}"
        code = self._process.returncode
        how = f"exit code {code}" if code is None or code >= 0 else f"killed by {signal.Signals(-code).name}"
        return f"the worker process died: {how}"

    # --- what the event loop calls ---------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._frames.feed(data):
                self._take(frame)
        except (FrameError, msgspec.MsgspecError) as error:
            self._fault = f"it broke the protocol ({error})"
            self.kill()
            return
        self._on_progress()

    def connection_lost(self, error: Exception | None) -> None:
        del error
        self._disconnected.set()
        if not self._hello.done():
            self._hello.set_result(Hello(concurrent=False, error=_NO_HELLO))
        self.kill()

    def _take(self, frame: bytes) -> None:
        if not self._hello.done():
            self._hello.set_result(_decode_hello(frame))
            return
        outcome = _decode_outcome(frame)
        pending = self._in_flight.pop(outcome.call_id, None)
        if pending is None:
            raise FrameError(f"an answer to call {outcome.call_id}, which is not in flight")
        if outcome.reward is None:
            pending.fail(EnvironmentFailure(outcome.kind or "environment_error", outcome.reason))
        elif not pending.outcome.done():
            pending.outcome.set_result(outcome)
        if not self._concurrent:
            now = self._loop.time()
            self._call_s += 0.2 * (now - pending.started_at - self._call_s)
            if head := next(iter(self._in_flight.values()), None):
                head.started_at = now
        self._watch_oldest()

    def _watch_oldest(self) -> None:
        self._stop_watching()
        if oldest := next(iter(self._in_flight.values()), None):
            patience_s = self._settings.step_timeout_s + (STALL_GRACE_S if self._concurrent else 0.0)
            self._deadline = self._loop.call_at(oldest.started_at + patience_s, self._give_up)

    def _stop_watching(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()

    def _give_up(self) -> None:
        self._late = True
        self.kill()


async def _spawn(link: socket.socket, code: WorkerCode, settings: EnvironmentSettings) -> Process:
    python_path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), _PACKAGE_ROOT]))
    # Sees no accelerator: the engine owns its memory. One thread of arithmetic unless the user asks for more.
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": ""}
    worker = "rollout_server.environments.worker"
    limits = [str(settings.step_timeout_s), str(settings.max_reply_bytes)]
    arguments = [str(link.fileno()), str(os.getpid()), *limits, code.module, code.name, *code.arguments]
    return await asyncio.create_subprocess_exec(
        *[sys.executable, "-m", worker, *arguments],
        stdin=DEVNULL,
        stdout=_STANDARD_ERROR,
        pass_fds=[link.fileno()],
        start_new_session=True,
        env=environ,
    )
