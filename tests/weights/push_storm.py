"""Pushes to several receivers over real sockets, each cut at a random byte: python -m tests.weights.push_storm."""

import argparse
import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rollout_server import pulled_snapshots
from tests.weights.fleet import CHUNK_BYTES, Fleet, Member, a_fleet

NUM_MEMBERS = 4
FULL_EVERY = 10  # pushes; every so often so much changes that a delta does not pay
FEW = 0.05  # share of elements that change in the other pushes
HEADERS_BYTES = 8 << 10  # manifests, twice where they are cut, handshakes and message headers
SLACK = 0.01
REPLY_TIMEOUT_S = 0.25


@dataclass
class Outcome:
    """What a storm showed. resent: per push and member, bytes that came down the wire beyond what was needed."""

    pushes: int = 0
    cuts: int = 0
    deltas: int = 0
    full: int = 0
    mixed: int = 0
    pulled_bytes: int = 0
    resent: list[int] = field(default_factory=list)
    most_over_bound: int = 0  # bytes; at most one chunk, the headers and 1 % may be sent again


async def push_storm(pushes: int, directory: Path, *, seed: int = 0, patience_s: float = 3600.0) -> Outcome:
    randomness = random.Random(seed)
    outcome = Outcome()
    async with a_fleet(directory, num_members=NUM_MEMBERS, patience_s=patience_s) as fleet:
        for push in range(pushes):
            ready = await fleet.publish(None if push % FULL_EVERY == 0 else FEW)
            push_bytes = ready.delta_bytes or ready.full_bytes
            await _push_once(fleet, push_bytes, randomness, outcome)
        outcome.deltas = sum(member.receiver.deltas_loaded for member in fleet.members)
        outcome.full = sum(member.receiver.full_loaded for member in fleet.members)
        outcome.mixed = sum(len(member.engine.mixed) for member in fleet.members)
        assert all(member.engine.loaded_version == fleet.version for member in fleet.members)
    return outcome


async def _push_once(fleet: Fleet, push_bytes: int, randomness: random.Random, outcome: Outcome) -> None:
    before = [_totals(member) for member in fleet.members]
    for member in fleet.members:
        member.proxy.cut_after = randomness.randrange(1, push_bytes)
    await fleet.deliver()
    outcome.pushes += 1
    for member, (passed, received, ended) in zip(fleet.members, before, strict=True):
        passed, received = member.proxy.passed["down"] - passed, member.receiver.received_bytes - received
        outcome.cuts += member.proxy.num_ended - ended
        outcome.pulled_bytes += received
        outcome.resent.append(max(0, passed - received))
        allowed = CHUNK_BYTES + HEADERS_BYTES + SLACK * push_bytes
        outcome.most_over_bound = max(outcome.most_over_bound, int(passed - received - allowed))
        if received != push_bytes:
            raise AssertionError(f"{received} bytes of chunks were taken, the version has {push_bytes}")


def _totals(member: Member) -> tuple[int, int, int]:
    return member.proxy.passed["down"], member.receiver.received_bytes, member.proxy.num_ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pushes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pulled_snapshots.REPLY_TIMEOUT_S = REPLY_TIMEOUT_S
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        outcome = asyncio.run(push_storm(options.pushes, Path(directory), seed=options.seed))
    resent = sorted(outcome.resent)
    print(f"{outcome.pushes} pushes to {NUM_MEMBERS} receivers, {outcome.cuts} connections cut, seed {options.seed}")
    print(f"{outcome.deltas} versions loaded as deltas, {outcome.full} as full snapshots; {outcome.mixed} mixed")
    print(f"{outcome.pulled_bytes / 1e6:.1f} MB pulled, chunks of {CHUNK_BYTES} bytes")
    print(f"bytes beyond these, per push: median {resent[len(resent) // 2]}, most {resent[-1]}")
    print(f"{time.monotonic() - start_s:.0f} s")
    if outcome.mixed or outcome.most_over_bound > 0:
        raise SystemExit(f"failed: {outcome.most_over_bound} bytes over the bound, {outcome.mixed} mixed")


if __name__ == "__main__":
    main()
