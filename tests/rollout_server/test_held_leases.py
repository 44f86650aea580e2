"""What a rollout server has promised, and how its groups are put into messages."""

import asyncio

import pytest

from common.codec import Decoder, encode
from common.messages import MAX_TOGETHER_BYTES, GroupsFinished, Lease, Leases
from common.trajectory import Group
from rollout_server.greeting import decoder
from rollout_server.held_leases import HeldLeases
from tests.builders_codec import a_group, a_trajectory
from tests.rollout_server.builders_server import a_lease

TIMEOUT_S = 5.0
NOW_S = 7.0
groups_decoder = Decoder(GroupsFinished, max_payload_bytes=1 << 30)


async def idle() -> None:
    await asyncio.sleep(0)


def holding(*lease_ids: int) -> HeldLeases:
    held = HeldLeases()
    for lease_id in lease_ids:
        held.begin(a_lease(lease_id), asyncio.create_task(idle()))
    return held


def leases_of(frames: list[bytes | memoryview]) -> list[int]:
    message, _ = groups_decoder.decode(frames)
    assert isinstance(message, GroupsFinished)
    return [group.lease_id for group in message.groups]


async def next_leases(held: HeldLeases) -> list[int]:
    async with asyncio.timeout(TIMEOUT_S):
        return leases_of((await held.next_message(lambda: NOW_S)).frames)


def finish(held: HeldLeases, lease_id: int, group: Group | None = None) -> None:
    held.finished(group or a_group(lease_id=lease_id))


async def test_a_group_goes_at_once_and_those_that_were_finished_meanwhile_go_together():
    held = holding(1, 2, 3, 4)
    finish(held, 1)
    assert await next_leases(held) == [1]
    for lease_id in (3, 2, 4):
        finish(held, lease_id)
    assert await next_leases(held) == [3, 2, 4]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await held.next_message(lambda: NOW_S)


async def test_groups_that_do_not_fit_into_a_message_go_with_the_next_one():
    held = holding(1, 2, 3)
    count = MAX_TOGETHER_BYTES // 9 // 2 - 100
    for lease_id in (1, 2, 3):
        large = a_trajectory(loss_mask=(False,) + count * (True,), versions=(3,) * count)
        finish(held, lease_id, a_group(large, lease_id=lease_id))
    assert [await next_leases(held) for _ in range(2)] == [[1, 2], [3]]


async def test_a_lease_that_is_taken_away_before_its_group_was_sent_is_not_sent():
    held = holding(1, 2)
    finish(held, 1)
    finish(held, 2)
    held.drop(1)
    assert await next_leases(held) == [2]


async def test_groups_are_sent_again_each_by_itself_and_none_that_was_not_sent_yet():
    held = holding(1, 2, 3)
    finish(held, 1)
    finish(held, 2)
    assert await next_leases(held) == [1, 2]
    finish(held, 3)
    sent: list[list[int]] = []

    def send(frames: list[bytes | memoryview]) -> bool:
        sent.append(leases_of(frames))
        return True

    held.resend(send, NOW_S + 4.9, after_s=5.0)
    assert sent == []
    held.resend(send, NOW_S + 5.0, after_s=5.0)
    assert sent == [[1], [2]]


def test_the_largest_row_can_be_leased():
    leases: tuple[Lease, ...] = (a_lease(1, row=bytes(1 << 20)),)
    assert decoder.decode(encode(Leases(leases=leases)))[0] == Leases(leases=leases)
