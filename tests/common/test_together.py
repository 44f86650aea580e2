"""Several leases, groups or acknowledgements in one message."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec import Decoder, ProtocolError, encode, pack_group, read_columns, unpack_groups
from common.messages import (
    MAX_TOGETHER,
    MAX_TOGETHER_BYTES,
    CoordinatorToServer,
    GroupsAccepted,
    GroupsFinished,
    ServerToCoordinator,
)
from common.together import in_messages, join_payloads, split_payload
from tests.builders_codec import a_group, a_group_header, a_trajectory


@settings(deadline=None)
@given(st.lists(st.integers(0, 2 * MAX_TOGETHER_BYTES // 3) | st.integers(0, 9), max_size=300))
def test_all_items_go_in_order_and_no_message_has_more_than_it_may_or_fewer_than_it_could(sizes: list[int]):
    items = list(enumerate(sizes))
    messages = list(in_messages(items, lambda item: item[1]))
    assert [item for message in messages for item in message] == items
    for message in messages:
        assert 1 <= len(message) <= MAX_TOGETHER
        assert len(message) == 1 or sum(size for _, size in message) <= MAX_TOGETHER_BYTES
    for message, (following, *_) in pairwise(messages):
        assert len(message) == MAX_TOGETHER or sum(size for _, size in (*message, following)) > MAX_TOGETHER_BYTES


def test_small_items_are_bounded_in_number():
    assert [len(message) for message in in_messages(range(150), lambda _: 1)] == [64, 64, 22]


def groups_of(*lengths: int) -> list[tuple]:
    """Of two trajectories each, of so many sampled tokens beside the prompt."""
    return [
        pack_group(
            a_group(
                a_trajectory(), a_trajectory(loss_mask=(False,) + length * (True,), versions=(3,) * length), lease_id=n
            )
        )
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("lengths", [(1,), (1, 1), (5, 1, 3), (1, 2, 3, 4, 5, 6)])
def test_payloads_that_are_joined_are_those_of_one_large_group_and_can_be_split_again(lengths: tuple[int, ...]):
    headers, payloads = zip(*groups_of(*lengths), strict=True)
    joined = join_payloads(headers, payloads)
    assert split_payload(headers, joined) == list(payloads)
    trajectories = tuple(trajectory for header in headers for trajectory in header.trajectories)
    read_columns(trajectories, joined)
    [as_one] = unpack_groups([msgspec.structs.replace(headers[0], trajectories=trajectories)], joined)
    one_by_one = unpack_groups(headers, b"".join(payloads))
    assert [t.token_ids.tolist() for t in as_one.trajectories] == [
        t.token_ids.tolist() for group in one_by_one for t in group.trajectories
    ]


def test_a_group_alone_is_sent_from_where_it_lies():
    [(header, payload)] = groups_of(3)
    assert join_payloads([header], [payload]) is payload
    assert split_payload([header], payload) == [payload]


@pytest.mark.parametrize("change", [-1, 1, 9])
def test_a_payload_of_another_length_than_the_headers_say_cannot_be_split(change: int):
    headers, payloads = zip(*groups_of(2, 3), strict=True)
    joined = bytes(join_payloads(headers, payloads))
    wrong = joined[:change] if change < 0 else joined + bytes(change)
    with pytest.raises(ProtocolError, match=rf"payload: expected {len(joined)} bytes for 13 tokens, got {len(wrong)}"):
        split_payload(headers, wrong)


@pytest.mark.parametrize("count", [0, MAX_TOGETHER + 1])
def test_a_message_of_more_than_it_may_carry_or_of_nothing_is_refused_before_it_is_looked_at(count: int):
    groups = Decoder(ServerToCoordinator, max_payload_bytes=0)
    with pytest.raises(ProtocolError, match=r"^header: Expected `array`"):
        groups.decode(encode(GroupsFinished(groups=(a_group_header(),) * count)))
    answers = Decoder(CoordinatorToServer, max_payload_bytes=0)
    with pytest.raises(ProtocolError, match=r"^header: Expected `array`"):
        answers.decode(encode(GroupsAccepted(lease_ids=(7,) * count)))
