"""BatchSender: batches on their way to the learner, in parts, no faster than it reads them.

A batch may be gigabytes. One message of that size would need as much memory again to be put together, at both ends,
and nothing could be read before all of it was written. Parts need none: a large group is sent from where it lies.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator

from common.codec import Frame, Frames, encode
from common.events import EventLog
from common.messages import GroupHeader
from common.wire import Peer, Router, SendResult
from learner.coordinator.decisions import DeliverBatch
from learner.coordinator.journal_keeper import JournalKeeper
from learner.coordinator.messages import Batch
from learner.coordinator.replay_queue import FinishedGroup, JournaledGroup, QueuedGroup
from learner.coordinator.token_ages import TokenAges
from learner.coordinator.turns import Turn

PART_BYTES = 1 << 18  # from here on a message costs no more per byte when it is larger
PARTS_ON_THE_WAY = 16
FIRST_WAIT_S, MAX_WAIT_S = 0.001, 0.02


def in_parts(groups: Iterable[QueuedGroup]) -> Iterator[list[QueuedGroup]]:
    """Consecutive groups of PART_BYTES together, or one group that is larger."""
    part: list[QueuedGroup] = []
    num_bytes = 0
    for group in groups:
        if part and num_bytes + group.num_bytes > PART_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(group)
        num_bytes += group.num_bytes
    if part:
        yield part


class BatchSender:
    """One batch after the other; what was sent is not kept."""

    def __init__(
        self,
        learner: Router,
        peer: Peer,
        journal: JournalKeeper,
        *,
        ages: TokenAges,
        events: EventLog | None,
    ) -> None:
        self._learner = learner
        self._peer = peer
        self._journal = journal
        self._ages = ages
        self._events = events
        self._batches: asyncio.Queue[DeliverBatch] = asyncio.Queue()

    def put(self, batch: DeliverBatch) -> None:
        """The journal has the batch: it may be trained."""
        self._batches.put_nowait(batch)

    async def run(self) -> None:
        while True:
            await self._send(await self._batches.get())

    async def _send(self, batch: DeliverBatch) -> None:
        parts = deque(in_parts(batch.groups))
        num_parts = len(parts)
        turn = Turn()
        for number in range(num_parts):
            groups = parts.popleft()
            headers, payload = await self._contents(groups)
            message = Batch(version=batch.version, groups=headers, part=number, num_parts=num_parts)
            await self._send_when_read(encode(message, payload))
            accepted_versions = (group.accepted_version for group in groups)
            self._ages.add(zip(headers, accepted_versions, strict=True), trained_version=batch.version)
            if turn.is_over:
                await turn.next()
        if self._events is not None:
            self._events.emit(
                "batch_delivered",
                version=batch.version,
                num_bytes=sum(group.num_bytes for group in batch.groups),
                leases=[group.lease_id for group in batch.groups],
                tasks=[group.task_id for group in batch.groups],
            )

    async def _contents(self, groups: list[QueuedGroup]) -> tuple[tuple[GroupHeader, ...], Frame]:
        """Of groups in memory, or of others that are read from the disk."""
        on_disk = [group.lease_id for group in groups if isinstance(group, JournaledGroup)]
        stored = await self._journal.read(on_disk) if on_disk else {}
        contents = [
            (group.header, group.payload) if isinstance(group, FinishedGroup) else stored[group.lease_id]
            for group in groups
        ]
        headers = tuple(header for header, _ in contents)
        return headers, contents[0][1] if len(contents) == 1 else b"".join(payload for _, payload in contents)

    async def _send_when_read(self, frames: Frames) -> None:
        wait_s = FIRST_WAIT_S
        while self._learner.send(self._peer, frames) is SendResult.FULL:
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_WAIT_S)
