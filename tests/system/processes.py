"""Commands of the project as real processes: started, watched by what they say, looked for when they should be gone."""

import asyncio
import os
import re
import shlex
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

from common.events import read_events
from common.lifecycle import ending_with_parent

ROOT = Path(__file__).parents[2]
COMMANDS = Path(sys.executable).parent  # what is installed, others' launchers too
OURS = ("learner", "rollout-server", "countercurrent")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
LOOK_EVERY_S = 0.05
START_S = 90.0  # importing vLLM and DeepSpeed on a busy machine
LEARNER = ("learner", "--run-dir", "run", "--group-size", "4", "--groups-per-step", "4", "--max-new-tokens", "8")


class Command:
    """A running command; what it prints goes to a file."""

    def __init__(self, words: Sequence[str], process: asyncio.subprocess.Process, log: Path) -> None:
        self._words = words
        self._process = process
        self._log = log

    def __repr__(self) -> str:
        return f"<Command {shlex.join(self._words)}, exit code {self._process.returncode}>\n{self.log}"

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.returncode is None

    def send_signal(self, which: signal.Signals) -> None:
        self._process.send_signal(which)

    async def says(self, pattern: str, *, timeout_s: float = START_S, times: int = 1) -> re.Match[str]:
        """The last match of `pattern` once the command printed it so often; fails at once when it ended before."""
        async with _patience(timeout_s, self, f"to say {pattern!r}"):
            while len(matches := list(re.finditer(pattern, self.log))) < times:
                assert self.is_running, f"ended before it said {pattern!r}: {self!r}"
                await asyncio.sleep(LOOK_EVERY_S)
        return matches[-1]

    async def exit_code(self, *, timeout_s: float = START_S) -> int:
        async with _patience(timeout_s, self, "to end"):
            return await self._process.wait()

    async def join_command(self) -> list[str]:
        """The words that a learner prints for people to paste."""
        return shlex.split((await self.says(r"rollout servers join with:\n\n(.*)\n\n"))[1])


class Stage:
    """A directory in which commands run: whatever has it as its working directory belongs to the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._commands: list[Command] = []
        self._numbers = count(1)

    async def start(self, *words: str, within: Sequence[str] = ()) -> Command:
        """Runs an installed command; `within`: words that put it elsewhere, as `ip netns exec NAME` does."""
        program, *arguments = words
        log = self.path / f"{next(self._numbers)}-{program}.log"
        ending = ending_with_parent() if program in OURS else {}  # a launcher's ranks have the launcher as their parent
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *within,
                str(COMMANDS / program),
                *arguments,
                cwd=self.path,
                env={**os.environ, **ending, **ENVIRONMENT},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._commands.append(Command(words, process, log))
        return self._commands[-1]

    async def fails(self, *words: str, within: Sequence[str] = ()) -> str:
        """What a command says that must refuse to work: exit code 2, and no traceback."""
        command = await self.start(*words, within=within)
        assert await command.exit_code() == 2, repr(command)
        assert "Traceback" not in command.log
        return command.log

    def events(self, pattern: str, kind: str) -> list[dict[str, Any]]:
        """Events of this kind in the logs that match, by time."""
        return [event for event in read_events(sorted(self.path.glob(pattern))) if event["kind"] == kind]

    def steps(self, lineage: int | str = "*") -> list[int]:
        """Versions that the learner recorded as completed, in the order of time."""
        return [event["step"] for event in self.events(f"run/events-learner-{lineage}.jsonl", "step")]

    async def reaches(self, learner: Command, step: int, *, timeout_s: float = START_S) -> None:
        """Waits until the learner has completed this step."""
        async with _patience(timeout_s, learner, f"to reach step {step}"):
            while max(self.steps(), default=0) < step:
                assert learner.is_running, f"ended before step {step}: {learner!r}"
                await asyncio.sleep(LOOK_EVERY_S)

    async def close(self) -> None:
        """Kills whatever is still running here, so that a failed test leaves nothing behind either."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for command in self._commands:
            await command.exit_code()

    def processes(self) -> dict[int, str]:
        """Command lines, by process id, of all that run here."""
        found = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and (entry / "cwd").readlink().is_relative_to(self.path):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found

    async def has_no(self, words: str = "", *, timeout_s: float = 3.0) -> bool:
        """Whether every process that runs here, or every one with `words` in its command line, ends within the time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._with(words):
                    await asyncio.sleep(LOOK_EVERY_S)
        return not self._with(words)

    def _with(self, words: str) -> list[str]:
        return [command_line for command_line in self.processes().values() if words in command_line]


@asynccontextmanager
async def _patience(timeout_s: float, command: Command, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise AssertionError(f"waited {timeout_s} s for {what}: {command!r}") from error


@asynccontextmanager
async def a_stage(path: Path) -> AsyncIterator[Stage]:
    stage = Stage(path)
    try:
        yield stage
    finally:
        await stage.close()
