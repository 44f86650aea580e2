"""Batches on their way to the learner: in parts, from where their groups lie, no faster than it reads."""

import asyncio
from contextlib import asynccontextmanager

from common.codec import Decoder
from common.wire import Peer, SendResult
from learner.coordinator import turns
from learner.coordinator.batch_sender import PART_BYTES, BatchSender, in_parts
from learner.coordinator.decisions import DeliverBatch
from learner.coordinator.messages import Batch
from learner.coordinator.token_ages import TokenAges
from tests.builders_coordinator import a_group
from tests.concurrency import seen_by_others

TIMEOUT_S = 5.0
LEARNER = Peer(b"learner", "")


class FakeRouter:
    """Takes as many messages as it has room for."""

    def __init__(self, room=1 << 20):
        self.room = room
        self.sent = []
        self.refused = asyncio.Event()

    def send(self, peer, frames):
        assert peer == LEARNER
        if not self.room:
            self.refused.set()
            return SendResult.FULL
        self.room -= 1
        self.sent.append(frames)
        return SendResult.SENT

    async def batch(self):
        """The messages of one batch."""
        decoder = Decoder(Batch, max_payload_bytes=1 << 30)
        async with asyncio.timeout(TIMEOUT_S):
            while not self.sent or (last := decoder.decode(self.sent[-1])[0]).part + 1 < last.num_parts:
                await asyncio.sleep(0.001)
        return [decoder.decode(frames)[0] for frames in self.sent]


class FakeJournal:
    def __init__(self, *groups):
        self.groups = {group.lease_id: (group.header, group.payload) for group in groups}
        self.asked = []

    async def read(self, lease_ids):
        self.asked.append(list(lease_ids))
        return {lease_id: self.groups[lease_id] for lease_id in lease_ids}


@asynccontextmanager
async def a_sender(router, journal=None, ages=None):
    sender = BatchSender(router, LEARNER, journal or FakeJournal(), ages=ages or TokenAges(), events=None)
    running = asyncio.create_task(sender.run())
    try:
        yield sender
    finally:
        running.cancel()


def groups_of(*sizes):
    return tuple(a_group(lease_id, payload_bytes=size) for lease_id, size in enumerate(sizes))


def sizes_of(parts):
    return [[len(group.payload) for group in part] for part in parts]


def test_small_groups_travel_together_and_large_ones_alone_all_in_their_order():
    small, large = PART_BYTES // 4, 3 * PART_BYTES
    parts = list(in_parts(groups_of(small, small, small, small, large, small)))
    assert sizes_of(parts) == [[small] * 3, [small], [large], [small]]
    assert [group.lease_id for part in parts for group in part] == list(range(6))
    assert list(in_parts(())) == []


async def test_a_batch_arrives_complete_and_a_large_group_is_sent_from_where_it_lies():
    router, groups = FakeRouter(), groups_of(100, 200, 2 * PART_BYTES, 300)
    async with a_sender(router) as sender:
        sender.put(DeliverBatch(version=3, groups=groups))
        messages = await router.batch()
    assert [(one.version, one.part, one.num_parts) for one in messages] == [(3, 0, 3), (3, 1, 3), (3, 2, 3)]
    assert [group.lease_id for one in messages for group in one.groups] == [0, 1, 2, 3]
    assert [len(payload) for _, payload in router.sent] == [300, 2 * PART_BYTES, 300]
    assert router.sent[1][1] is groups[2].payload


async def test_what_is_not_read_is_not_sent_and_the_rest_follows_when_it_is():
    router = FakeRouter(room=1)
    async with a_sender(router) as sender:
        sender.put(DeliverBatch(version=0, groups=groups_of(*[PART_BYTES] * 3)))
        await asyncio.wait_for(router.refused.wait(), TIMEOUT_S)
        assert len(router.sent) == 1
        router.room = 2
        assert [one.part for one in await router.batch()] == [0, 1, 2]


async def test_groups_without_bytes_are_read_from_the_journal_part_by_part():
    groups = groups_of(PART_BYTES, 100, 200)
    router, journal = FakeRouter(room=1), FakeJournal(*groups)
    batch = DeliverBatch(version=0, groups=(groups[0].without_bytes(), groups[1].without_bytes(), groups[2]))
    async with a_sender(router, journal) as sender:
        sender.put(batch)
        await asyncio.wait_for(router.refused.wait(), TIMEOUT_S)
        assert journal.asked == [[0], [1]]
        router.room = 1
        messages = await router.batch()
    assert [group.lease_id for one in messages for group in one.groups] == [0, 1, 2]
    assert bytes(router.sent[1][1]) == bytes(300)


async def test_the_ages_of_delivered_tokens_are_counted_where_they_grew_old():
    router, ages = FakeRouter(), TokenAges()
    groups = (a_group(0, oldest=1), a_group(1, oldest=3), a_group(2, oldest=3))
    async with a_sender(router, ages=ages) as sender:
        sender.put(DeliverBatch(version=4, groups=groups))
        await router.batch()
    assert (ages.staleness, ages.in_flight, ages.in_queue) == ({3: 1, 1: 2}, {0: 3}, {3: 1, 1: 2})


async def test_others_have_a_turn_between_the_parts_of_a_batch(monkeypatch):
    monkeypatch.setattr(turns, "TURN_S", -1.0)
    router = FakeRouter()
    async with a_sender(router) as sender:
        sender.put(DeliverBatch(version=0, groups=groups_of(*[PART_BYTES] * 3)))
        assert await seen_by_others(lambda: len(router.sent), until=3) >= {1, 2, 3}
