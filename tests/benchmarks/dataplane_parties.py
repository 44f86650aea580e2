"""The processes of bench_dataplane: the coordinator and the senders as children, the learner as an object."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import zmq

from common.environments import Environments
from common.messages import GroupHeader, Message
from learner.coordinator.messages import (
    Batch,
    CheckpointSaved,
    CloseRun,
    CoordinatorStatus,
    CoordinatorToLearner,
    OpenRun,
    RunOpened,
    SnapshotPublished,
    StepCompleted,
    TakeBatch,
)
from learner.coordinator.service_settings import ServiceSettings, write_settings
from learner.coordinator.settings import CoordinatorSettings
from tests.benchmarks.dataplane_groups import TOKENS, VOCAB_SIZE, group_bytes
from tests.benchmarks.dataplane_workload import Plan

M = TypeVar("M", bound=Message)

TIMEOUT_S = 20.0
STATUS_TIMEOUT_S = 90.0
END_S = 10.0
CHECKPOINT_EVERY_STEPS = 8
PROMPT_CHARS = 1000
PROMPTS = 1000


@dataclass(frozen=True, kw_only=True)
class Case:
    """What flows, and through what."""

    group_size: int
    servers: int = 1
    journal: str = "durable"
    step_trajectories: int = 1024
    max_staleness: int = 2
    warm_up_s: float = 1.0
    measured_s: float = 2.0

    @property
    def groups_per_step(self) -> int:
        return self.step_trajectories // self.group_size


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What came of it."""

    trajectories: int
    wall_s: float
    cpu_s: float = 0.0  # of the coordinator, all of its threads

    @property
    def rate(self) -> float:
        return self.trajectories / self.wall_s

    @property
    def cpu_us(self) -> float:
        return self.cpu_s / self.trajectories * 1e6


def cpu_s(pid: int) -> float:
    """User and system time of a process, ended threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int, what: str) -> int:
    """VmRSS: resident now; VmHWM: at most so far."""
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) << 10


@contextmanager
def a_process(module: str, *arguments: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Killed at the end of the block, if it has not ended by then."""
    with log.open("ab") as output:
        process = subprocess.Popen([sys.executable, "-m", module, *arguments], stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def senders(role: str, plan: Plan, directory: Path) -> Iterator["subprocess.Popen[bytes]"]:
    path = directory / f"{plan.names[0]}.json"
    path.write_bytes(msgspec.json.encode(plan))
    log = directory / f"{plan.names[0]}.log"
    with a_process("tests.benchmarks.dataplane_workload", role, str(path), log=log) as process:
        try:
            yield process
        except Exception as error:
            error.add_note(f"{plan.names[0]} said: {log.read_text()[-2000:]}")
            raise


class FakeLearner:
    """Trains a batch in no time, publishes a snapshot of no bytes after it, and a checkpoint now and then."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._decoder = msgspec.msgpack.Decoder(CoordinatorToLearner)  # type: ignore[var-annotated]
        self.version = 0
        self.trajectories = 0
        self.completed_at: list[float] = []  # when each step was said to be completed
        self.status: CoordinatorStatus | None = None

    def say(self, message: Message) -> None:
        self._socket.send_multipart([msgspec.msgpack.encode(message), b""])

    def hear(self, kind: type[M]) -> M:
        """The next message of this kind."""
        return self._hear(kind)[0]

    def hear_part(self) -> tuple[Batch, memoryview]:
        """Of a batch."""
        return self._hear(Batch)

    def _hear(self, kind: type[M]) -> tuple[M, memoryview]:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            if not self._socket.poll(max(0.0, deadline - time.monotonic()) * 1e3):
                waiting_for = self.status.waiting_for if self.status is not None else "nothing was heard"
                raise TimeoutError(f"no {kind.__name__} within {TIMEOUT_S:.0f} s: {waiting_for}")
            header, payload = self._socket.recv_multipart(copy=False)
            message = self._decoder.decode(header.buffer)
            if isinstance(message, CoordinatorStatus):
                self.status = message
            if isinstance(message, kind):
                return message, payload.buffer

    def hear_status(self, until: Callable[[CoordinatorStatus], bool]) -> CoordinatorStatus:
        """The first status of which that is true."""
        deadline = time.monotonic() + STATUS_TIMEOUT_S
        while not until(status := self.hear(CoordinatorStatus)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {STATUS_TIMEOUT_S:.0f} s; the last status: {status}")
        return status

    def open(self) -> str:
        run = OpenRun(
            version=0, model_fingerprint="model", tokenizer_fingerprint="tokenizer", max_model_len=TOKENS,
            vocab_size=VOCAB_SIZE, dtype="float32", weights_address="tcp://127.0.0.1:1", frontier=b"",
        )  # fmt: skip
        self.say(run)
        address = self.hear(RunOpened).listen_address
        self.say(SnapshotPublished(version=0))
        return address

    def step(self) -> None:
        self.say(TakeBatch(version=self.version))
        groups: list[GroupHeader] = []
        is_complete = False
        while not is_complete:
            batch = self.hear(Batch)
            groups += batch.groups
            is_complete = batch.part + 1 == batch.num_parts
        self.trajectories += sum(len(group.trajectories) for group in groups)
        self.version += 1
        self.completed_at.append(time.monotonic())
        self.say(StepCompleted(version=self.version, lease_ids=tuple(group.lease_id for group in groups)))
        self.say(SnapshotPublished(version=self.version))
        if self.version % CHECKPOINT_EVERY_STEPS == 0:
            self.say(CheckpointSaved(version=self.version))

    def train_for(self, seconds: float, coordinator_pid: int, *, step_s: float = 0.0) -> Flow:
        """From one completed batch to another. `step_s`: a step is begun no earlier than that after the one before."""
        began, cpu_before, before = time.monotonic(), cpu_s(coordinator_pid), self.trajectories
        next_s = began
        while (now := time.monotonic()) < began + seconds:
            time.sleep(max(0.0, next_s - now))
            next_s = max(next_s, now) + step_s
            self.step()
        now = time.monotonic()
        return Flow(
            trajectories=self.trajectories - before, wall_s=now - began, cpu_s=cpu_s(coordinator_pid) - cpu_before
        )


def settings_for(case: Case, directory: Path, *, event_log: str = "", **rules: int) -> ServiceSettings:
    prompts = directory / "prompts.jsonl"
    prompts.write_text((json.dumps({"prompt": "x" * PROMPT_CHARS}) + "\n") * PROMPTS)
    open_groups = (case.max_staleness + 2) * case.groups_per_step
    values = {
        "groups_per_step": case.groups_per_step,
        "max_staleness": case.max_staleness,
        "queue_groups": open_groups,
        "queue_bytes": open_groups * group_bytes(case.group_size),
        "max_group_bytes": group_bytes(case.group_size),
    }
    return ServiceSettings(
        run_id="benchmark",
        learner_socket=f"ipc://{directory}/learner",
        listen="tcp://127.0.0.1:0",
        rules=CoordinatorSettings(**(values | rules)),
        model="model",
        environments=Environments.at("python:none:none").specs,
        prompts=str(prompts),
        group_size=case.group_size,
        max_new_tokens=TOKENS,
        lease_secret="0" * 32,
        journal=str(directory / "journal.sqlite"),
        event_log=event_log,
    )


@dataclass(frozen=True)
class Running:
    learner: FakeLearner
    address: str
    pid: int  # of the coordinator


@contextmanager
def a_coordinator(journal: str, settings: ServiceSettings, directory: Path) -> Iterator[Running]:
    """A coordinator process whose run is open, and its learner."""
    path, log = directory / "settings.json", directory / "coordinator.log"
    write_settings(settings, path)
    with ExitStack() as stack:
        process = stack.enter_context(a_process("tests.benchmarks.dataplane_coordinator", journal, str(path), log=log))
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        socket = context.socket(zmq.DEALER)
        socket.connect(settings.learner_socket)
        learner = FakeLearner(socket)
        try:
            yield Running(learner, learner.open(), process.pid)
            learner.say(CloseRun(reason="measured"))
            process.wait(END_S)
        except Exception as error:
            error.add_note(f"the coordinator said: {log.read_text()[-2000:]}")
            raise
