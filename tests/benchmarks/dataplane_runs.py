"""One run of the data plane, or of its control, from fresh processes to their end."""

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import msgspec
import zmq
from msgspec.structs import replace

from common.messages import MAX_TOGETHER_BYTES
from common.wire.options import RECEIVE_QUEUE_BYTES
from learner.coordinator.inbox import INBOX_BYTES
from learner.coordinator.messages import CloseRun, CoordinatorStatus
from learner.coordinator.service import MAX_HEADER_BYTES
from tests.benchmarks.dataplane_groups import group_bytes
from tests.benchmarks.dataplane_parties import (
    END_S,
    TIMEOUT_S,
    Case,
    Flow,
    Running,
    a_coordinator,
    memory_bytes,
    senders,
    settings_for,
)
from tests.benchmarks.dataplane_workload import Plan, Report

PROBES = 8
NUM_SERVERS = 6  # of run_memory
PROBE_HEARTBEAT_S = 0.02


def names(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}-{number}" for number in range(count))


def capacity(case: Case) -> int:
    """Leases for each server, so that all of them have the same share of the work."""
    return -(-(case.max_staleness + 1) * case.groups_per_step // case.servers)


def run_subject(case: Case, directory: Path) -> Flow:
    """Validated trajectories from servers through the queue into batches."""
    settings = settings_for(case, directory)
    with a_coordinator(case.journal, settings, directory) as running:
        plan = Plan(
            address=running.address,
            group_size=case.group_size,
            names=names("server", case.servers),
            capacity_groups=capacity(case),
        )
        with senders("servers", plan, directory):
            running.learner.train_for(case.warm_up_s, running.pid)
            return running.learner.train_for(case.measured_s, running.pid)


def run_control(case: Case, directory: Path) -> Flow:
    """The same messages, received and thrown away by a blocking loop."""
    with ExitStack() as stack:
        context = zmq.Context()
        stack.callback(context.destroy, linger=0)
        socket = context.socket(zmq.ROUTER)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        plan = Plan(address=f"tcp://127.0.0.1:{port}", group_size=case.group_size, names=names("raw", case.servers))
        stack.enter_context(senders("raw", plan, directory))
        receive_for(socket, case.warm_up_s)
        began = time.monotonic()
        messages = receive_for(socket, case.measured_s)
        return Flow(trajectories=messages * case.group_size, wall_s=time.monotonic() - began)


def receive_for(socket: "zmq.Socket[bytes]", seconds: float) -> int:
    socket.set(zmq.RCVTIMEO, int(TIMEOUT_S * 1e3))
    socket.recv_multipart(copy=False)  # the first one: the sender is there
    until, messages = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        socket.recv_multipart(copy=False)
        messages += 1
    return messages


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Milliseconds from what was said to its answer, of servers that do their share like all others."""

    flow: Flow
    pulse_ms: list[float]
    ack_ms: list[float]
    lease_ms: list[float]


def run_latency(case: Case, directory: Path, *, step_s: float = 0.0) -> Latencies:
    """step_s: the learner takes so long for a step, and servers take up to so long for a group; 0: no time at all."""
    settings = settings_for(case, directory)
    with ExitStack() as stack:
        running = stack.enter_context(a_coordinator(case.journal, settings, directory))
        plan = Plan(
            address=running.address,
            group_size=case.group_size,
            names=names("server", case.servers - PROBES),
            capacity_groups=capacity(case),
            spread_s=step_s,
        )
        stack.enter_context(senders("servers", plan, directory))
        probes = replace(
            plan, names=names("probe", PROBES), heartbeat_s=PROBE_HEARTBEAT_S, report=str(directory / "report.json")
        )
        probing = stack.enter_context(senders("servers", probes, directory))
        running.learner.train_for(case.warm_up_s, running.pid, step_s=step_s)
        measured_from = time.monotonic()
        flow = running.learner.train_for(case.measured_s, running.pid, step_s=step_s)
        report = end_and_read(running, probing, Path(probes.report))
        return Latencies(
            flow=flow,
            pulse_ms=[ms for at, ms in report.pulse_ms if at >= measured_from],
            ack_ms=[ms for at, ms in report.ack_ms if at >= measured_from],
            lease_ms=lease_ms(case, running, report, measured_from),
        )


def lease_ms(case: Case, running: Running, report: Report, measured_from: float) -> list[float]:
    """From the completed step that made room for it. The first leases were granted without one."""
    per_step, completed_at = case.groups_per_step, running.learner.completed_at
    first = (case.max_staleness + 1) * per_step
    steps = [((lease_id - first) // per_step, at) for lease_id, at in report.leases if lease_id >= first]
    steps = [(step, at) for step, at in steps if at >= measured_from]
    return [(at - completed_at[step]) * 1e3 for step, at in steps if step < len(completed_at)]


def end_and_read(running: Running, process: "subprocess.Popen[bytes]", report: Path) -> Report:
    """Of servers that must have ended well."""
    running.learner.say(CloseRun(reason="measured"))
    if process.wait(END_S) != 0:
        raise RuntimeError(f"servers ended with exit code {process.returncode}")
    return msgspec.json.decode(report.read_bytes(), type=Report)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of a coordinator whose learner has stopped."""

    queue_bytes: int  # the bound
    ingress_bytes: int  # likewise, of what has arrived and was not heard yet, over all connections
    sent_bytes: int  # in groups for leases
    rss_before: int
    peak_rss: int
    status: CoordinatorStatus  # when all had arrived
    good: Report  # of the good servers

    @property
    def growth(self) -> int:
        return self.peak_rss - self.rss_before


def ingress_bytes(num_servers: int, group_size: int) -> int:
    """What may have arrived from so many servers and not have been heard yet: on its connection, or in the inbox."""
    message_bytes = max(MAX_TOGETHER_BYTES, group_bytes(group_size))
    return INBOX_BYTES + num_servers * RECEIVE_QUEUE_BYTES // MAX_HEADER_BYTES * message_bytes


def run_memory(directory: Path, *, queue_bytes: int, copies: int, group_size: int = 4) -> Memory:
    """Two servers send every group many times, two what they have no lease for, and two are good.

    The first have two thirds of the leases, so that (1 + 2 * copies) / 3 times the bound is sent. All would do more
    than there is room for. The good ones end with an error when anything of theirs is refused.
    """
    num_groups = queue_bytes // group_bytes(group_size)

    def sent(status: CoordinatorStatus) -> int:
        return (status.queued + status.refused.get("duplicate", 0)) * group_bytes(group_size)

    settings = settings_for(Case(group_size=group_size, max_staleness=num_groups), directory, queue_bytes=queue_bytes)
    with ExitStack() as stack:
        running = stack.enter_context(a_coordinator("durable", settings, directory))
        learner, rss_before = running.learner, memory_bytes(running.pid, "VmRSS")
        good = Plan(
            address=running.address,
            group_size=group_size,
            names=names("good", 2),
            capacity_groups=num_groups,
            heartbeat_s=PROBE_HEARTBEAT_S,
            report=str(directory / "report.json"),
        )
        again = replace(good, names=names("again", 2), copies=copies, capacity_groups=num_groups // 3, report="")
        stack.enter_context(senders("servers", again, directory))
        again_groups = 2 * again.capacity_groups
        learner.hear_status(lambda status: status.leased >= again_groups)
        floods = replace(good, names=names("flood", 2), capacity_groups=1)
        stack.enter_context(senders("floods", floods, directory))
        being_good = stack.enter_context(senders("servers", good, directory))
        status = learner.hear_status(
            lambda status: not status.running and sent(status) > (1 + copies) / 2 * queue_bytes
        )
        learner.hear_status(lambda _: True)  # servers have been told meanwhile that the queue is full
        return Memory(
            queue_bytes=queue_bytes,
            ingress_bytes=ingress_bytes(NUM_SERVERS, group_size),
            sent_bytes=sent(status),
            rss_before=rss_before,
            peak_rss=memory_bytes(running.pid, "VmHWM"),
            status=status,
            good=end_and_read(running, being_good, Path(good.report)),
        )
