"""Who sends in bench_dataplane: imitations of rollout servers, good ones and others.

`python -m tests.benchmarks.dataplane_workload ROLE PLAN.json`, where ROLE is

servers  rollout servers of a real coordinator; with `copies`, they send every group many times
floods   servers that join and then send groups they have no leases for, as fast as the socket takes them
raw      senders that nobody answers
"""

import heapq
import itertools
import random
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from common.messages import (
    PROTOCOL_VERSION,
    CoordinatorToServer,
    Finished,
    GroupRefused,
    GroupsAccepted,
    Heartbeat,
    Hello,
    Lease,
    Leases,
    Message,
    Pulse,
    Ready,
    Refused,
    Welcome,
)
from tests.benchmarks.dataplane_groups import GroupMaker

POLL_MS = 100
HEARTBEAT_S = 1.0
SEND_QUEUE = 64  # messages on their way from who has no credits: enough to keep it busy, few enough for the caches
NOT_GRANTED = 1 << 40  # a lease


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one process of senders does, as a JSON file."""

    address: str
    group_size: int
    names: tuple[str, ...]  # one server, with a connection of its own, for each
    capacity_groups: int = 1 << 20
    heartbeat_s: float = HEARTBEAT_S
    spread_s: float = 0.0  # a group is sent up to so long after its lease, as sampling takes one longer than another
    copies: int = 1  # how often each group is sent: more than once is more than its lease pays for
    report: str = ""  # file for the latencies of what it said and heard


class Report(msgspec.Struct, kw_only=True):
    """When an answer came, in seconds of the monotonic clock, and milliseconds from what was said to it."""

    pulse_ms: list[tuple[float, float]] = []
    ack_ms: list[tuple[float, float]] = []
    leases: list[tuple[int, float]] = []  # lease id, and when it came, in seconds of the monotonic clock
    waiting_for: set[str] = set()  # all that servers were told about that


class FakeServer:
    """Fulfils every lease at once, or at a random time within spread_s. Weights of any version need no time to load."""

    def __init__(self, name: str, plan: Plan, maker: GroupMaker, socket: "zmq.Socket[bytes]", report: Report) -> None:
        self._plan, self._maker, self._report = plan, maker, report
        self.socket = socket
        self._epoch = f"{name}-{time.monotonic_ns()}"
        self._name = name
        self._loaded = -1
        self._early: deque[Lease] = deque()  # leases that need a newer policy
        self._sampling: list[tuple[float, int, Lease]] = []  # heap: (when it is done, lease id, lease)
        self._random = random.Random(name)
        self._progress = 0
        self._sent_at: dict[int, float] = {}
        self._asked_at: deque[float] = deque()
        self._heartbeat_at = float("inf")
        self.finished = False

    def say(self, message: Message) -> None:
        self.socket.send_multipart([msgspec.msgpack.encode(message), b""])

    def greet(self) -> None:
        self.say(Hello(protocol=PROTOCOL_VERSION, server=self._name, epoch=self._epoch))

    def beat_if_due(self, now: float) -> None:
        if now >= self._heartbeat_at:
            self._beat(now)

    def _beat(self, now: float) -> None:
        self._heartbeat_at = now + self._plan.heartbeat_s
        self._asked_at.append(now)
        beat = Heartbeat(
            progress=self._progress, loaded_version=self._loaded, running_groups=0, generated_tokens=0, busy_s=0.0,
            paused_s=0.0, doing="sending",
        )  # fmt: skip
        self.say(beat)

    def hear(self, message: CoordinatorToServer, now: float) -> None:
        match message:
            case Leases():
                self._report.leases += ((lease.lease_id, now) for lease in message.leases)
                self._early += message.leases
                self._fulfil()
            case GroupsAccepted():
                sent_at = map(self._sent_at.pop, message.lease_ids)
                self._report.ack_ms += ((now, (now - each) * 1e3) for each in sent_at)
            case Pulse():
                self._pulse(message, now)
            case Welcome():
                self._loaded = message.published_version
                self.say(
                    Ready(
                        model_fingerprint=message.model_fingerprint,
                        tokenizer_fingerprint=message.tokenizer_fingerprint,
                        capacity_groups=self._plan.capacity_groups,
                        capacity_bytes=1 << 50,
                    )
                )
                self._beat(now)
            case Finished():
                self.finished = True
            case GroupRefused() if self._plan.copies > 1 or self.finished:
                pass
            case Refused() | GroupRefused():
                raise RuntimeError(f"{self._name}: {message.reason}")

    def _pulse(self, pulse: Pulse, now: float) -> None:
        self._report.waiting_for.add(pulse.waiting_for)
        if pulse.published_version > self._loaded:  # told at once, and not asked for
            self._loaded = pulse.published_version
            self._beat(now)
            self._fulfil()
        elif self._asked_at:
            self._report.pulse_ms.append((now, (now - self._asked_at.popleft()) * 1e3))

    def _fulfil(self) -> None:
        ready = []
        while self._early and self._early[0].min_version <= self._loaded:
            lease = self._early.popleft()
            if self._plan.spread_s:
                done_at = time.monotonic() + self._random.uniform(0.0, self._plan.spread_s)
                heapq.heappush(self._sampling, (done_at, lease.lease_id, lease))
            else:
                ready.append(lease)
        self._send(ready)

    @property
    def next_done_at(self) -> float:
        return self._sampling[0][0] if self._sampling else float("inf")

    def send_done(self, now: float) -> None:
        done = []
        while self.next_done_at <= now:
            done.append(heapq.heappop(self._sampling)[2])
        self._send(done)

    def _send(self, leases: list[Lease]) -> None:
        """Groups that are done at the same time go together, as those of a rollout server do."""
        self._progress += len(leases)
        self._sent_at.update(dict.fromkeys((lease.lease_id for lease in leases), time.monotonic()))
        for message in self._maker.messages(((lease.lease_id, lease.task_id) for lease in leases), self._loaded):
            for _ in range(self._plan.copies):
                send(self.socket, message)


def send(socket: "zmq.Socket[bytes]", message: tuple[bytes, zmq.Frame]) -> None:
    header, payload = message
    socket.send(header, zmq.SNDMORE)
    socket.send(payload, copy=False)


def run_servers(plan: Plan, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """Until the coordinator says that the run is over."""
    maker, report, poller = GroupMaker(plan.group_size), Report(), zmq.Poller()
    decoder = msgspec.msgpack.Decoder(CoordinatorToServer)  # type: ignore[var-annotated]
    servers: dict[object, FakeServer] = {}
    for name in plan.names:
        socket = a_dealer(context, plan.address)
        server = servers[socket] = FakeServer(name, plan, maker, socket, report)
        poller.register(socket, zmq.POLLIN)
        server.greet()
    while not all(server.finished for server in servers.values()):
        wait_ms = (min(server.next_done_at for server in servers.values()) - time.monotonic()) * 1e3
        for socket, _ in poller.poll(max(0.0, min(POLL_MS, int(plan.heartbeat_s * 500), wait_ms))):
            drain(socket, lambda header, s=socket: servers[s].hear(decoder.decode(header), time.monotonic()))
        now = time.monotonic()
        for server in servers.values():
            server.beat_if_due(now)
            server.send_done(now)
    if plan.report:
        Path(plan.report).write_bytes(msgspec.json.encode(report))


def drain(socket: "zmq.Socket[bytes]", hear: Callable[[bytes], None]) -> None:
    while True:
        try:
            header, _ = socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return
        hear(header)


def a_dealer(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, send_queue_messages: int = 0
) -> "zmq.Socket[bytes]":
    """Without a bound of its own by default: credits bound what is on its way."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.SNDHWM, send_queue_messages)
    socket.set(zmq.RCVHWM, 0)
    socket.connect(address)
    return socket


def run_floods(plan: Plan, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """Until the process is stopped. What the coordinator answers is not read."""
    maker, report = GroupMaker(plan.group_size), Report()
    servers = [
        FakeServer(name, plan, maker, a_dealer(context, plan.address, SEND_QUEUE), report) for name in plan.names
    ]
    decoder = msgspec.msgpack.Decoder(CoordinatorToServer)  # type: ignore[var-annotated]
    for server in servers:
        server.greet()
        server.hear(decoder.decode(server.socket.recv_multipart()[0]), time.monotonic())
    for number in itertools.count(NOT_GRANTED):
        for server in servers:
            for message in maker.messages([(number, number)], 0):
                send(server.socket, message)


def run_raw(plan: Plan, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
    """The same bytes, one group a message, as fast as they are taken, until the process is stopped."""
    [message] = GroupMaker(plan.group_size).messages([(0, 0)], 0)
    sockets = [a_dealer(context, plan.address, SEND_QUEUE) for _ in plan.names]
    while True:
        for socket in sockets:
            send(socket, message)


def main() -> int:
    role, path = sys.argv[1:]
    plan = msgspec.json.decode(Path(path).read_bytes(), type=Plan)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    {"servers": run_servers, "floods": run_floods, "raw": run_raw}[role](plan, context)
    context.destroy(linger=0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
