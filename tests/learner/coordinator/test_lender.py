"""Leases on their way to servers: no faster than those read them, and nobody waits for another's reading."""

import asyncio
import threading
from contextlib import asynccontextmanager

import pytest

from common.messages import MAX_TOGETHER_BYTES, Leases
from common.wire import Peer
from learner.coordinator import turns
from learner.coordinator.core import Coordinator
from learner.coordinator.lender import Lender
from learner.coordinator.outbound import Outbound
from learner.coordinator.records import grant_of
from learner.coordinator.tasks import Task
from tests.builders_coordinator import a_hello, join, some_service_settings, some_settings
from tests.concurrency import seen_by_others

TIMEOUT_S = 5.0
A, B = Peer(b"a", ""), Peer(b"b", "")


class FakeTasks:
    def __init__(self, row_bytes, are_in_memory):
        self.row_bytes = row_bytes
        self.are_in_memory = are_in_memory
        self.asked_by = set()

    def task(self, task_id):
        self.asked_by.add(threading.current_thread())
        return Task(row=bytes(self.row_bytes), seed=task_id)


class FakeMailer:
    def __init__(self):
        self.behind = set()

    def is_behind(self, peer):
        return peer in self.behind


class Desk:
    """A lender of ten leases for two servers; `told` are the servers of those that went out.

    By default no two rows fit into one message.
    """

    def __init__(self, reads_only=1 << 20, row_bytes=MAX_TOGETHER_BYTES, are_in_memory=False):
        self.reads_only = reads_only
        self.core = Coordinator(some_settings(groups_per_step=5))
        self.core.published(0, now=0.0)
        self.outbound = Outbound(some_service_settings(), self.core)
        self.mailer = FakeMailer()
        self.tasks = FakeTasks(row_bytes, are_in_memory)
        self.lender = Lender(self.tasks, self.outbound, self.mailer, post=self.post)
        self.told = []
        self.num_messages = 0
        for name, peer in (("a", A), ("b", B)):
            self.outbound.sessions.greet(a_hello(name, epoch=name), peer=peer, now=0.0)

    def post(self):
        while self.outbound.letters:
            letter = self.outbound.letters.popleft()
            assert isinstance(letter.message, Leases)
            self.num_messages += 1
            self.told += [letter.peer] * len(letter.message.leases)
            if self.told.count(A) >= self.reads_only:
                self.mailer.behind.add(A)

    def grant(self):
        for name in ("a", "b"):
            join(self.core, name, groups=5)
        for member in self.core.members.values():
            for lease_id in member.leases:
                self.outbound.carry_out([grant_of(self.core.book.running[lease_id])])

    async def told_are(self, count):
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.told) < count:
                await asyncio.sleep(0.001)

    async def retry(self):
        """Returns when everything that was granted before was looked at again."""
        self.lender.retry()
        [lease_id, *_] = self.core.members["b"].leases
        self.outbound.carry_out([grant_of(self.core.book.running[lease_id])])
        self.lender.wake()
        await self.told_are(len(self.told) + 1)


@asynccontextmanager
async def lending(desk):
    running = asyncio.create_task(desk.lender.run())
    try:
        desk.grant()
        desk.lender.wake()
        yield
    finally:
        running.cancel()


async def test_everybody_is_told_its_leases():
    desk = Desk()
    async with lending(desk):
        await desk.told_are(10)
    assert (desk.told.count(A), desk.told.count(B)) == (5, 5)


async def test_leases_of_one_server_go_in_one_message_as_far_as_they_fit():
    for row_bytes, num_messages in ((2, 2), (MAX_TOGETHER_BYTES // 3, 6), (MAX_TOGETHER_BYTES, 10)):
        desk = Desk(row_bytes=row_bytes)
        async with lending(desk):
            await desk.told_are(10)
        assert desk.num_messages == num_messages


@pytest.mark.parametrize("are_in_memory", [False, True])
async def test_tasks_are_asked_for_in_a_thread_unless_they_are_in_memory(are_in_memory):
    desk = Desk(are_in_memory=are_in_memory)
    async with lending(desk):
        await desk.told_are(10)
    assert (desk.tasks.asked_by == {threading.main_thread()}) == are_in_memory


async def test_a_server_that_does_not_read_gets_no_more_and_others_get_theirs():
    desk = Desk(reads_only=2)
    async with lending(desk):
        await desk.told_are(7)
        await desk.retry()
        assert (desk.told.count(A), desk.told.count(B)) == (2, 6)
        desk.mailer.behind.clear()
        desk.reads_only = 1 << 20
        desk.lender.retry()
        await desk.told_are(11)
    assert (desk.told.count(A), desk.told.count(B)) == (5, 6)


async def test_a_lease_that_was_given_up_while_its_server_did_not_read_is_not_told():
    desk = Desk(reads_only=1)
    async with lending(desk):
        await desk.told_are(6)
        desk.core.server_left("a", "enough", now=0.0)
        desk.mailer.behind.clear()
        await desk.retry()
    assert (desk.told.count(A), desk.told.count(B)) == (1, 6)


async def test_others_have_a_turn_between_the_messages_of_leases(monkeypatch):
    monkeypatch.setattr(turns, "TURN_S", -1.0)
    desk = Desk(row_bytes=2)
    async with lending(desk):
        assert await seen_by_others(lambda: desk.num_messages, until=2) >= {1, 2}


async def test_who_waits_until_leases_are_sent_waits_for_messages_and_not_for_rows(monkeypatch):
    monkeypatch.setattr(turns, "TURN_S", -1.0)
    desk, is_asked, may_answer = Desk(row_bytes=2), threading.Event(), threading.Event()
    make_tasks = Lender._make_tasks

    def slow_rows(lender, grants):
        is_asked.set()
        assert may_answer.wait(TIMEOUT_S)
        return make_tasks(lender, grants)

    monkeypatch.setattr(Lender, "_make_tasks", slow_rows)
    async with lending(desk):
        assert await asyncio.to_thread(is_asked.wait, TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S / 2):
            await desk.lender.wait_until_sent()
        assert desk.num_messages == 0
        may_answer.set()
        async with asyncio.timeout(TIMEOUT_S):
            while not desk.num_messages:
                await asyncio.sleep(0)
            await desk.lender.wait_until_sent()
        assert desk.num_messages == 2
