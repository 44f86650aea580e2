"""What waits to be heard, and what need not."""

import asyncio

import pytest

from common.codec import encode
from common.messages import LeaseFailed, Leaving
from common.wire import Incoming, Peer
from learner.coordinator.inbox import MESSAGE_OVERHEAD_BYTES, Inbox
from tests.builders_coordinator import a_heartbeat, a_hello

PATIENCE_S = 10.0


def incoming(message, peer="a", payload=b""):
    return Incoming(Peer(peer.encode(), peer), encode(message, payload))


def groups(peer="a", size=100):
    return Incoming(Peer(peer.encode(), peer), [b"groups", bytes(size)])


def fill(inbox, *messages):
    for message in messages:
        inbox.put(message)


def test_groups_wait_for_their_turn_and_come_out_in_the_order_of_their_arrival():
    inbox, sent = Inbox(), [groups("a"), groups("b"), groups("a")]
    assert not any(inbox.may_be_heard_now(each) for each in sent)
    fill(inbox, *sent)
    assert [inbox.take() for _ in range(4)] == [*sent, None]


def test_a_heartbeat_does_not_wait_behind_groups():
    inbox = Inbox()
    fill(inbox, groups("a"), groups("b"))
    assert inbox.may_be_heard_now(incoming(a_heartbeat()))


@pytest.mark.parametrize(
    "message", [Leaving(reason="it stops"), LeaseFailed(lease_id=1, kind="k", reason="r"), a_hello("a", epoch="e")]
)
def test_what_else_a_server_says_keeps_its_place_behind_its_own_groups_and_behind_no_others(message):
    inbox = Inbox()
    fill(inbox, groups("a"))
    assert not inbox.may_be_heard_now(incoming(message, "a"))
    assert inbox.may_be_heard_now(incoming(message, "b"))
    inbox.take()
    assert inbox.may_be_heard_now(incoming(message, "a"))


def test_a_heartbeat_that_takes_its_server_out_of_service_waits_for_the_groups_before_it():
    inbox = Inbox()
    fill(inbox, groups("a"))
    assert not inbox.may_be_heard_now(incoming(a_heartbeat(out_of_service="wrong weights")))


def test_a_heartbeat_does_not_overtake_what_its_server_said_before_beside_groups():
    inbox, failed = Inbox(), incoming(LeaseFailed(lease_id=1, kind="k", reason="r"))
    fill(inbox, groups("a"), failed)
    assert not inbox.may_be_heard_now(incoming(a_heartbeat()))
    assert [inbox.take(), inbox.take()] == [groups("a"), failed]
    fill(inbox, groups("a"))
    assert inbox.may_be_heard_now(incoming(a_heartbeat()))


@pytest.mark.parametrize("header", [b"", b"\xc1 nonsense", b"\x90", encode(a_heartbeat())[0] + bytes(1 << 15)])
def test_what_cannot_be_read_behind_groups_waits_for_who_judges_it(header):
    inbox = Inbox()
    fill(inbox, groups("a"))
    assert not inbox.may_be_heard_now(Incoming(Peer(b"a", "a"), [header, b""]))


async def test_no_more_is_taken_in_than_its_bound_and_one_message():
    size = 1000
    inbox = Inbox(max_bytes=2 * (size + MESSAGE_OVERHEAD_BYTES))
    fill(inbox, groups(size=size))
    async with asyncio.timeout(PATIENCE_S):
        await inbox.wait_for_room()
    fill(inbox, groups(size=size))
    waiting = asyncio.ensure_future(inbox.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    inbox.take()
    async with asyncio.timeout(PATIENCE_S):
        await waiting


async def test_who_hears_waits_while_there_is_nothing():
    inbox = Inbox()
    waiting = asyncio.ensure_future(inbox.wait_for_messages())
    await asyncio.sleep(0)
    assert not waiting.done()
    fill(inbox, groups())
    async with asyncio.timeout(PATIENCE_S):
        await waiting
    assert (inbox.take(), inbox.take()) == (groups(), None)
    waiting = asyncio.ensure_future(inbox.wait_for_messages())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()


def test_what_an_operator_asks_for_is_in_its_repr():
    inbox = Inbox(max_bytes=1 << 20)
    fill(inbox, groups(size=100))
    assert repr(inbox) == f"<Inbox 1 messages, {100 + 6 + MESSAGE_OVERHEAD_BYTES} of 1048576 bytes>"
