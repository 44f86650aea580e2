"""Fleet: a learner and rollout servers as real processes, started again whenever they end, until the run is done."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.lifecycle import ending_with_parent
from deploy.up import a_free_port
from learner.demo.model import build_demo_model
from tests.storm.table_policy import save_table_model

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
RESTART_PAUSE_S = 0.2
FAREWELL_S = 10.0  # for servers to hear that the run is over
LOOK_EVERY_S = 0.02
TAIL_BYTES = 1 << 14
# What each process is known by in its command line. The first that matches counts.
ROLES = {
    "coordinator": "learner.coordinator",
    "snapshot server": "learner.snapshot_server",
    "environment worker": "environments.worker",
    "engine": "VLLM::EngineCore",
}


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What learner and rollout servers are made of."""

    learner: str  # modules
    rollout_server: str
    make_model: Callable[[Path], None]
    learning_rate: float
    patience_s: float  # for a process to start: importing vLLM and DeepSpeed takes a while


TABLE = Stack(
    learner="tests.storm.learner_process",
    rollout_server="tests.storm.server_process",
    make_model=save_table_model,
    learning_rate=0.05,
    patience_s=8.0,
)
REAL = Stack(
    learner="learner",
    rollout_server="rollout_server",
    make_model=build_demo_model,
    learning_rate=1e-3,
    patience_s=40.0,
)


class Fleet:
    """Keeps its processes running in one directory; whatever has it as working directory belongs to the fleet."""

    def __init__(
        self,
        directory: Path,
        learner_flags: Sequence[object],
        *,
        servers: int,
        reward: str = "reward",
        stack: Stack = TABLE,
        server_flags: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.stack = stack
        self._roles = ROLES | {"learner": f"-m {stack.learner} ", "rollout server": f"-m {stack.rollout_server} "}
        self._address = f"tcp://127.0.0.1:{a_free_port()}"
        stack.make_model(directory / "model")
        common = ("--metrics-listen", "")
        self._learner_flags = (
            "--model", str(directory / "model"), "--data", "python:tests.storm.task:prompts", "--environment",
            f"python:tests.storm.task:{reward}", "--listen", self._address, "--run-dir", "run", "--no-tensorboard",
            "--max-model-len", "64", "--max-new-tokens", "8", *common, *map(str, learner_flags),
        )  # fmt: skip
        self._server_flags = ("--learner", self._address, "--environment-timeout-s", "10", *common, *server_flags)
        self._num_servers = servers
        self.is_done = asyncio.Event()
        self.starts = 0

    async def run(self) -> None:
        """Returns when the learner has finished, and the servers were told so."""
        async with asyncio.TaskGroup() as tasks:
            servers = [tasks.create_task(self.keep_server(number)) for number in range(self._num_servers)]
            while await self.live_learner() != 0:
                await asyncio.sleep(RESTART_PAUSE_S)
            self.is_done.set()
            await asyncio.wait(servers, timeout=FAREWELL_S)
            # Once cancelled, a server's task waits for its process: a second time would keep it from that.
            for server in servers:
                server.cancel()

    async def live_learner(self) -> int:
        """One life of the learner; returns its exit code."""
        return await self._once(self.stack.learner, self._learner_flags, "learner.log")

    async def keep_server(self, number: int) -> None:
        """A rollout server, started again whenever it ends."""
        flags = (*self._server_flags, "--name", f"server-{number}", "--run-dir", f"server-{number}")
        while not self.is_done.is_set():
            await self._once(self.stack.rollout_server, flags, f"server-{number}.log")
            await asyncio.sleep(RESTART_PAUSE_S)

    async def _once(self, module: str, flags: Sequence[str], log: str) -> int:
        """One life of a process; returns its exit code."""
        self.starts += 1
        with (self.directory / log).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, *flags,
                cwd=self.directory,
                env={**os.environ, **ending_with_parent(), **ENVIRONMENT},
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        try:
            return await process.wait()
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    def processes(self) -> dict[int, str]:
        """Role by process id, of all that run here."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and (entry / "cwd").readlink().is_relative_to(self.directory):
                    words = (entry / "cmdline").read_text().replace("\0", " ")
                    if role := next((role for role, mark in self._roles.items() if mark in words), ""):
                        found[int(entry.name)] = role
        return found

    def signal(self, pid: int, which: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, which)

    def family(self, pid: int) -> set[int]:
        """The process and all that it started, and they in turn, as far as they run here."""
        parents = {}
        for one in self.processes():
            with suppress(OSError):
                parents[one] = int(Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()[1])
        found = {pid}
        while more := {one for one, parent in parents.items() if parent in found} - found:
            found |= more
        return found

    async def has_ended(self, pids: set[int], timeout_s: float) -> bool:
        """Whether all of them are gone within the time."""
        deadline_s = time.monotonic() + timeout_s
        while pids & self.processes().keys():
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(LOOK_EVERY_S)
        return True

    def kill_all(self) -> None:
        for pid in self.processes():
            self.signal(pid, signal.SIGKILL)

    async def ends_everywhere(self, timeout_s: float = 5.0) -> list[str]:
        """Roles of processes that are still there when they should all have ended."""
        deadline_s = time.monotonic() + timeout_s
        while (left := self.processes()) and time.monotonic() < deadline_s:
            await asyncio.sleep(LOOK_EVERY_S)
        return sorted(left.values())

    def last_step(self) -> int:
        """The step recorded last, of whatever life of the learner; 0 before the first."""
        logs = sorted(self.directory.glob("run/events-learner-*.jsonl"), key=lambda path: path.stat().st_mtime)
        if not logs:
            return 0
        with logs[-1].open("rb") as log:
            log.seek(max(0, logs[-1].stat().st_size - TAIL_BYTES))
            found = re.findall(rb'"kind":"step","step":(\d+),', log.read())
        return int(found[-1]) if found else 0
