"""HeldLeases: what this server has promised: leases it works on, and groups that nobody has acknowledged yet."""

import asyncio
from collections.abc import Callable

from common import messages
from common.codec import Frames


class HeldLeases:
    """Every lease from its grant until the learner accepted, refused or cancelled it, or it failed here."""

    def __init__(self) -> None:
        self._proofs: dict[int, messages.HeldLease] = {}
        self._working: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: dict[int, tuple[Frames, float]] = {}  # and when they were sent, in seconds

    def __contains__(self, lease_id: int) -> bool:
        return lease_id in self._proofs

    @property
    def num_working(self) -> int:
        return len(self._working)

    @property
    def num_unacknowledged(self) -> int:
        return len(self._unacknowledged)

    def awaited_version(self, loaded_version: int) -> int | None:
        """The version that must be loaded before work on any lease can go on; None when one can, or there is none."""
        awaited = min((self._proofs[lease_id].min_version for lease_id in self._working), default=loaded_version)
        return awaited if awaited > loaded_version else None

    def begin(self, lease: messages.Lease, work: asyncio.Task[None]) -> None:
        self._proofs[lease.lease_id] = messages.HeldLease(
            lease_id=lease.lease_id, task_id=lease.task_id, min_version=lease.min_version, proof=lease.proof
        )
        self._working[lease.lease_id] = work

    def task_of(self, lease_id: int) -> int | None:
        """None for a lease that is not held."""
        held = self._proofs.get(lease_id)
        return held.task_id if held is not None else None

    def finished(self, lease_id: int, frames: Frames, now_s: float) -> None:
        """The group is being sent, and kept until it is acknowledged."""
        self._working.pop(lease_id, None)
        self._unacknowledged[lease_id] = (frames, now_s)

    def drop(self, lease_id: int) -> None:
        """Nothing more is to be done about the lease."""
        self._proofs.pop(lease_id, None)
        self._unacknowledged.pop(lease_id, None)
        work = self._working.pop(lease_id, None)
        if work is not None and work is not asyncio.current_task():
            work.cancel()

    def working(self) -> tuple[int, ...]:
        """Leases whose groups are not finished."""
        return tuple(self._working)

    def drop_all(self) -> None:
        for lease_id in list(self._proofs):
            self.drop(lease_id)

    def claims(self) -> tuple[messages.HeldLease, ...]:
        """For a coordinator that may not know of them."""
        return tuple(self._proofs.values())

    def resend(self, send: Callable[[Frames], bool], now_s: float, *, after_s: float) -> None:
        """Groups that were not acknowledged for `after_s` seconds: the coordinator may have been away."""
        for lease_id, (frames, sent_s) in self._unacknowledged.items():
            if now_s - sent_s >= after_s and send(frames):
                self._unacknowledged[lease_id] = (frames, now_s)

    def __repr__(self) -> str:
        return f"<HeldLeases {self.num_working} working, {self.num_unacknowledged} unacknowledged>"
