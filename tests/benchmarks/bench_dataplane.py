"""What the data plane costs: trajectories from rollout servers through the coordinator into batches.

The coordinator is the real process: real ZeroMQ over TCP, every value validated, every group in the journal (SQLite,
WAL, synchronous FULL) before it is acknowledged. Rollout servers and the learner are imitations which do no work of
their own: servers send groups for the leases of one message at once and together, the learner takes one batch after
the other. Trajectories have 256 + 1,024 tokens, 11.5 kB. Controls, run in turns with it:

  raw       one process sends the same bytes over ZeroMQ, another one receives them in a blocking loop and throws them
            away: no validation, no journal, no second hop to a learner, nobody answers. Once with one trajectory a
            message, which is what the gate compares with, and once with one group a message.
  volatile  the coordinator with a journal that keeps nothing.

What is printed, as medians over the rounds (of the first four the gates are for groups of 16, the learner's default;
smaller groups are there to see what they cost, and most miss them):

  over raw           validated trajectories/s of the volatile coordinator, over raw with one trajectory a message
  CPU                microseconds of the coordinator process per trajectory, all its threads, journal included
  durable/volatile   trajectories/s; what the disk costs. It depends on the disk: the sustained rate of one write +
                     fdatasync after the other, 2 MB each, is printed beside it
  64 servers / 1     CPU per trajectory, with as many leases open in both cases
  memory             the learner has stopped; servers try to make ten times what the queue may hold, some send every
                     group again and again, others send what they have no lease for
  control messages   milliseconds until a server has its answer while data flows: from a heartbeat to its pulse, from
                     a completed step to the leases that it made room for, from a group to its acknowledgement. Only
                     the last one waits for the disk, whose own write + fdatasync of 1 MB is printed beside it.
                     At full speed, and at a share of that rate (--load), with groups that are done at different times.
                     At full speed an acknowledgement tells how many groups are on their way before it
                     (--latency-trajectories), by Little's law: it is printed beside that, and not judged.

All processes share the machine's cores: on two of them the senders and the learner take time from the coordinator.
Run it on a quiet machine. Run as `python -m tests.benchmarks.bench_dataplane`, or with --only for a part of it.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.dataplane_groups import TRAJECTORY_BYTES
from tests.benchmarks.dataplane_parties import Case, Flow
from tests.benchmarks.dataplane_runs import Latencies, run_control, run_latency, run_memory, run_subject

GROUP_SIZES = (1, 4, 16)
DEFAULT_GROUP_SIZE = 16  # what the learner asks for unless told otherwise: the gates are for these
FAIRNESS_GROUP_SIZES = (4, 16)
MANY_SERVERS = 64
COPIES = 16  # of the groups of those that send them again: two thirds of all
MIB = 1 << 20


@dataclass(frozen=True)
class Gate:
    """A figure must be on the right side of the gate, and should be on that of the goal."""

    gate: float
    goal: float
    at_least: bool

    def verdict(self, value: float) -> str:
        sign = ">=" if self.at_least else "<="
        met, reached = (value >= bound if self.at_least else value <= bound for bound in (self.gate, self.goal))
        goal = "" if self.goal == self.gate else f", goal {sign} {self.goal:g}: {'met' if reached else 'missed'}"
        return f"gate {sign} {self.gate:g}: {'met' if met else 'MISSED'}{goal}"

    def is_met(self, value: float) -> bool:
        return value >= self.gate if self.at_least else value <= self.gate


OVER_RAW = Gate(0.5, 0.9, at_least=True)
CPU_US = Gate(60.0, 30.0, at_least=False)
DURABLE = Gate(0.3, 0.6, at_least=True)
MANY_OVER_ONE = Gate(1.4, 1.4, at_least=False)
MEMORY_OVER_BOUND = Gate(1.15, 1.15, at_least=False)
BEYOND_BOUND_MIB = Gate(64.0, 64.0, at_least=False)
CONTROL_MS = Gate(20.0, 20.0, at_least=False)
DISK_TIMES = 100  # a round

ANSWERS: dict[str, Callable[[Latencies], list[float]]] = {
    "pulse": lambda one: one.pulse_ms,
    "lease": lambda one: one.lease_ms,
    "acknowledgement": lambda one: one.ack_ms,
}


class Verdicts:
    """Prints figures with their gates, and remembers which were missed."""

    def __init__(self) -> None:
        self.missed: list[str] = []

    def judge(
        self, what: str, value: float, gate: Gate, *, digits: int = 2, note: str = "", counts: bool = True
    ) -> None:
        """counts: whether it fails the run to miss the gate."""
        print(f"  {what:<44} {value:8.{digits}f}   {gate.verdict(value)}{note}{'' if counts else ', does not count'}")
        if counts and not gate.is_met(value):
            self.missed.append(what)


def in_turns(rounds: int, runs: dict[str, Callable[[], Flow]]) -> dict[str, list[Flow]]:
    """Every run once a round, in an order that turns with the rounds."""
    flows: dict[str, list[Flow]] = defaultdict(list)
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            flow = runs[name]()
            flows[name].append(flow)
            cpu = f", {flow.cpu_us:.1f} us CPU" if flow.cpu_s else ""
            print(f"    round {number + 1}  {name:<22} {flow.rate:8.0f} trajectories/s{cpu}", flush=True)
    return flows


def in_a_directory(run: Callable[[Path], Flow]) -> Flow:
    with tempfile.TemporaryDirectory(prefix="countercurrent-bench-") as name:
        return run(Path(name))


def disk_s(num_bytes: int, times: int) -> list[float]:
    """Seconds of each of so many writes that are synced, one after the other."""
    data, took_s = os.urandom(num_bytes), []
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(times):
            began = time.monotonic()
            os.pwrite(file.fileno(), data, 0)
            os.fdatasync(file.fileno())
            took_s.append(time.monotonic() - began)
    return took_s


def disk_rate(num_bytes: int = 2 * MIB, times: int = 16) -> float:
    """Bytes per second of writing and syncing, one after the other."""
    return times * num_bytes / sum(disk_s(num_bytes, times))


def bench_throughput(arguments: argparse.Namespace, verdicts: Verdicts) -> None:
    print("throughput and CPU")
    runs: dict[str, Callable[[], Flow]] = {}
    for size in GROUP_SIZES:
        case = Case(group_size=size, measured_s=arguments.seconds)
        runs[f"raw, groups of {size}"] = lambda case=case: in_a_directory(lambda d: run_control(case, d))
        for journal in ("volatile", "durable"):
            one = replace(case, journal=journal)
            runs[f"{journal}, groups of {size}"] = lambda case=one: in_a_directory(lambda d: run_subject(case, d))
    flows = in_turns(arguments.rounds, runs)

    def median(name: str, what: Callable[[Flow], float] = lambda flow: flow.rate) -> float:
        return statistics.median(what(flow) for flow in flows[name])

    def ratio(name: str, other: str) -> float:
        pairs = zip(flows[name], flows[other], strict=True)
        return statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)

    for size in GROUP_SIZES:
        raw, volatile, durable = (f"{kind}, groups of {size}" for kind in ("raw", "volatile", "durable"))
        print(
            f"  groups of {size}: raw {median(raw):.0f}/s, volatile {median(volatile):.0f}/s, durable "
            f"{median(durable):.0f}/s = {median(durable) * TRAJECTORY_BYTES / 1e6:.0f} MB/s into the journal"
        )
        counts = size == DEFAULT_GROUP_SIZE
        same = f" (over raw with one group a message: {ratio(volatile, raw):.2f})"
        over_raw = ratio(volatile, "raw, groups of 1")
        verdicts.judge(f"groups of {size}: over raw", over_raw, OVER_RAW, note=same, counts=counts)
        volatile_us = f" (volatile: {median(volatile, lambda flow: flow.cpu_us):.1f})"
        verdicts.judge(
            f"groups of {size}: CPU, us per trajectory", median(durable, lambda flow: flow.cpu_us), CPU_US, digits=1,
            note=volatile_us, counts=counts,
        )  # fmt: skip
        verdicts.judge(f"groups of {size}: durable / volatile", ratio(durable, volatile), DURABLE, counts=counts)
    print(f"  the disk: {disk_rate() / 1e6:.0f} MB/s")


def bench_servers(arguments: argparse.Namespace, verdicts: Verdicts) -> None:
    print("fairness")
    runs: dict[str, Callable[[], Flow]] = {}
    for size in FAIRNESS_GROUP_SIZES:
        for count in (1, MANY_SERVERS):
            case = Case(group_size=size, servers=count, measured_s=arguments.seconds)
            runs[f"groups of {size}, {count} servers"] = lambda case=case: in_a_directory(
                lambda d: run_subject(case, d)
            )
    flows = in_turns(arguments.rounds, runs)
    for size in FAIRNESS_GROUP_SIZES:
        one, many = (flows[f"groups of {size}, {count} servers"] for count in (1, MANY_SERVERS))
        ratio = statistics.median(many.cpu_us / one.cpu_us for one, many in zip(one, many, strict=True))
        title = f"groups of {size}: CPU, {MANY_SERVERS} servers / 1"
        verdicts.judge(title, ratio, MANY_OVER_ONE, counts=size == DEFAULT_GROUP_SIZE)


def bench_memory(arguments: argparse.Namespace, verdicts: Verdicts) -> None:
    print("memory")
    with tempfile.TemporaryDirectory(prefix="countercurrent-bench-") as name:
        memory = run_memory(Path(name), queue_bytes=arguments.queue_mib * MIB, copies=COPIES)
    print(
        f"  bound of the queue {memory.queue_bytes / MIB:.0f} MiB, of what was not heard "
        f"{memory.ingress_bytes / MIB:.0f} MiB, sent {memory.sent_bytes / MIB:.0f} MiB, queued "
        f"{memory.status.queued_bytes / MIB:.0f} MiB; process {memory.rss_before / MIB:.0f} MiB before, "
        f"{memory.peak_rss / MIB:.0f} MiB at most; servers wait for {memory.status.servers_wait_for}"
    )
    verdicts.judge("growth of the process / bound", memory.growth / memory.queue_bytes, MEMORY_OVER_BOUND)
    beyond = (memory.peak_rss - memory.queue_bytes - memory.ingress_bytes) / MIB
    verdicts.judge("the process beyond queue and ingress, MiB", beyond, BEYOND_BOUND_MIB, digits=1)


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def bench_latency(arguments: argparse.Namespace, verdicts: Verdicts) -> None:
    print("control messages")
    case = Case(
        group_size=arguments.latency_group_size, servers=MANY_SERVERS, max_staleness=1,
        step_trajectories=arguments.latency_trajectories // 2, measured_s=2 * arguments.seconds, warm_up_s=3.0,
    )  # fmt: skip
    full: list[Latencies] = []
    paced: list[Latencies] = []
    disk_ms: list[float] = []
    for number in range(arguments.rounds):
        full.append(latency_of(case))
        disk_ms += (1e3 * took_s for took_s in disk_s(MIB, DISK_TIMES))
        paced.append(latency_of(case, step_s=case.step_trajectories / full[-1].flow.rate / arguments.load))
        rates = " and ".join(f"{one[-1].flow.rate:.0f}" for one in (full, paced))
        print(f"    round {number + 1}  {rates} trajectories/s", flush=True)
    on_their_way = statistics.median(arguments.latency_trajectories / one.flow.rate * 1e3 for one in full)
    for title, rounds in (("at full speed", full), (f"at {arguments.load:g} of that", paced)):
        for what, of in ANSWERS.items():
            if rounds is paced and what == "lease":
                continue  # fewer are lent then, and which step made room for which cannot be told
            p50, p99 = (statistics.median(percentile(of(one), share) for one in rounds) for share in (0.5, 0.99))
            if rounds is full and what == "acknowledgement":
                print(f"  {what} {title}: p99 {p99:.1f} ms, p50 {p50:.1f}; {on_their_way:.1f} by Little's law")
            else:
                verdicts.judge(f"{what} {title}: p99 in ms", p99, CONTROL_MS, digits=1, note=f" (p50: {p50:.1f})")
    print(f"  the disk, 1 MB: p99 {percentile(disk_ms, 0.99):.1f} ms, p50 {percentile(disk_ms, 0.5):.1f}")


def latency_of(case: Case, step_s: float = 0.0) -> Latencies:
    with tempfile.TemporaryDirectory(prefix="countercurrent-bench-") as name:
        return run_latency(case, Path(name), step_s=step_s)


PARTS = {"throughput": bench_throughput, "servers": bench_servers, "memory": bench_memory, "latency": bench_latency}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_dataplane", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="of every run, in turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="measured in each run, after a warm-up (default: 2)")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part of it; may be repeated")
    parser.add_argument("--queue-mib", type=int, default=256, help="bound of the queue for memory (default: 256)")
    parser.add_argument(
        "--latency-group-size",
        type=int,
        default=DEFAULT_GROUP_SIZE,
        help=f"trajectories of a group for control messages (default: {DEFAULT_GROUP_SIZE})",
    )
    parser.add_argument(
        "--latency-trajectories",
        type=int,
        default=2048,
        help="leased or queued at once for control messages (default: 2048)",
    )
    parser.add_argument(
        "--load",
        type=float,
        default=0.7,
        help="for control messages, beside full speed, as a share of that rate (default: 0.7)",
    )
    arguments = parser.parse_args()
    verdicts = Verdicts()
    for name in arguments.only or PARTS:
        PARTS[name](arguments, verdicts)
    print(f"{len(verdicts.missed)} gates missed{': ' if verdicts.missed else ''}{'; '.join(verdicts.missed)}")
    return 1 if verdicts.missed else 0


if __name__ == "__main__":
    sys.exit(main())
