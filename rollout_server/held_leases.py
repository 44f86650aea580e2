"""HeldLeases: what this server has promised: leases it works on, and groups that nobody has acknowledged yet."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from common import messages
from common.codec import Frames, encode, pack_group
from common.together import in_messages, join_payloads
from common.trajectory import Group


@dataclass(slots=True)
class _Finished:
    """A group that nobody has acknowledged."""

    header: messages.GroupHeader
    payload: bytes
    num_bytes: int  # in a message
    newest_version: int  # of its tokens
    sent_s: float = math.inf  # when it was last sent, in seconds; infinite: not yet


class FinishedMessage(NamedTuple):
    """Groups on their way."""

    frames: Frames
    newest_version: int  # of their tokens


class HeldLeases:
    """Every lease from its grant until the learner accepted, refused or cancelled it, or it failed here."""

    def __init__(self) -> None:
        self._proofs: dict[int, messages.HeldLease] = {}
        self._working: dict[int, asyncio.Task[None]] = {}
        self._unacknowledged: dict[int, _Finished] = {}
        self._unsent: dict[int, _Finished] = {}  # those of them that were not sent yet, the earliest first
        self._has_unsent = asyncio.Event()

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

    def finished(self, group: Group) -> None:
        """The group is to be sent, and kept until it is acknowledged."""
        self._working.pop(group.lease_id, None)
        header, payload = pack_group(group)
        num_bytes = len(msgspec.msgpack.encode(header)) + len(payload)
        finished = _Finished(header, payload, num_bytes, group.newest_version)
        self._unacknowledged[group.lease_id] = self._unsent[group.lease_id] = finished
        self._has_unsent.set()

    async def next_message(self, now_s: Callable[[], float]) -> FinishedMessage:
        """Groups that were not sent yet, as many as are there by now and fit; waits for one. Now they count as sent."""
        while not self._unsent:
            self._has_unsent.clear()
            await self._has_unsent.wait()
        some, sent_s = next(in_messages(self._unsent.values(), lambda finished: finished.num_bytes)), now_s()
        for finished in some:
            finished.sent_s = sent_s
            del self._unsent[finished.header.lease_id]
        return FinishedMessage(_frames(some), max(finished.newest_version for finished in some))

    def drop(self, lease_id: int) -> None:
        """Nothing more is to be done about the lease."""
        self._proofs.pop(lease_id, None)
        self._unacknowledged.pop(lease_id, None)
        self._unsent.pop(lease_id, None)
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
        """Groups that were not acknowledged for `after_s` seconds: the coordinator may have been away.

        Each in a message of its own: one that cannot be read takes no other with it.
        """
        for finished in self._unacknowledged.values():
            if now_s - finished.sent_s >= after_s and send(_frames([finished])):
                finished.sent_s = now_s

    def __repr__(self) -> str:
        return f"<HeldLeases {self.num_working} working, {self.num_unacknowledged} unacknowledged>"


def _frames(groups: list[_Finished]) -> Frames:
    headers = tuple(finished.header for finished in groups)
    payload = join_payloads(headers, [finished.payload for finished in groups])
    return encode(messages.GroupsFinished(groups=headers), payload)
