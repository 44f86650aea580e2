"""Liar: what a rollout server sends that no correct one does."""

import math
from typing import TYPE_CHECKING

import msgspec

from common.messages import HeldLease, Lease, LeaseFailed
from tests.simulation.groups import Runs
from tests.simulation.plan import MAX_GROUP_BYTES

if TYPE_CHECKING:
    from tests.simulation.server_process import ServerProcess

LIE_SHARE = 0.5
FAR_FUTURE = 1 << 30


class Liar:
    """Half of the time it does its work, so that it is trusted."""

    def __init__(self, process: "ServerProcess") -> None:
        self._process = process
        self._kinds = process.plan.lies
        self._done: list[Lease] = []

    def boast(self, loaded: int) -> int:
        """The version it says it has loaded."""
        return FAR_FUTURE if "boast" in self._kinds or "future_version" in self._kinds else loaded

    def claims(self, held: tuple[HeldLease, ...]) -> tuple[HeldLease, ...]:
        """The leases it says it holds."""
        old = tuple(
            HeldLease(lease_id=done.lease_id, task_id=done.task_id, min_version=done.min_version, proof=done.proof)
            for done in self._done
        )
        if "old_claim" in self._kinds:
            held = (*held, *old, *held)
            for done in self._done:
                self._process.world.clock.after(1.0, self._give_up, done.lease_id)
        if "forged_claim" in self._kinds:
            forged = (msgspec.structs.replace(one, task_id=one.task_id + 1, lease_id=one.lease_id + 1) for one in old)
            held = (*held, *forged)
        return held

    def _give_up(self, lease_id: int) -> None:
        """Nobody could tell a server that holds a lease for ever from one that takes its time."""
        if self._process.is_alive and lease_id not in self._process.held:
            self._process.line.send(LeaseFailed(lease_id=lease_id, kind="other", reason="never mind"))

    def lie(self, lease: Lease, runs: Runs) -> bool:
        """True: a lie was sent in place of the group."""
        self._done.append(lease)
        rng = self._process.world.rng
        if rng.random() > LIE_SHARE:
            return False
        kind = rng.choice(self._kinds)
        match kind:
            case "future_version" | "unconfirmed_version" | "too_stale":
                return self._lie_about_versions(kind, lease, runs)
            case "wrong_task":
                other = msgspec.structs.replace(lease, task_id=lease.task_id + rng.choice([1, 7]))
                self._process.send_group(other, runs, lie=kind)
                return True
            case "too_large":
                tokens = MAX_GROUP_BYTES // 8
                self._process.send_group(lease, runs, lie=kind, claimed=((runs[0][0], tokens),))
                return True
            case "not_finite":
                self._process.send_group(lease, runs, lie=kind, logprob=math.nan)
                return True
            case _:
                self._lie_beside_the_work(kind, lease, runs)
                return False

    def _lie_about_versions(self, kind: str, lease: Lease, runs: Runs) -> bool:
        newest = self._process.world.learner.newest_snapshot_at_all()
        if kind == "future_version":
            claimed: Runs = ((runs[0][0], 1), (newest + self._process.world.rng.randint(1, 3), 1))
        elif kind == "unconfirmed_version" and newest > self._process.weights.loaded:
            claimed = ((newest, 2),)
        elif kind == "too_stale" and lease.min_version > 0:
            claimed = ((lease.min_version - 1, 1), *runs)
        else:
            return False
        self._process.send_group(lease, runs, lie=kind, claimed=claimed)
        return True

    def _lie_beside_the_work(self, kind: str, lease: Lease, runs: Runs) -> None:
        rng = self._process.world.rng
        if kind == "garbage":
            self._process.line.send("header: truncated")
        elif kind == "replayed":
            self._process.send_group(rng.choice(self._done), runs, lie=kind, once=True)
        elif kind == "not_yours":
            step = rng.choice([-2, -1, 1, 2, 50])
            other = msgspec.structs.replace(
                lease, lease_id=max(0, lease.lease_id + step), task_id=max(0, lease.task_id + step)
            )
            self._process.send_group(other, runs, lie=kind, once=True)
