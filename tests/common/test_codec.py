import math
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codec import (
    BYTES_PER_TOKEN,
    LOGPROB_SLACK,
    Decoder,
    ProtocolError,
    check_group,
    check_vocabulary,
    encode,
    pack_group,
    read_columns,
    unpack_groups,
)
from common.messages import GroupHeader, GroupsFinished, Leaving, ServerToCoordinator, TrajectoryHeader
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory
from learner.coordinator.messages import TakeFrontier
from tests.builders_codec import UNIONS, a_group, a_group_header, a_trajectory, examples_of

MAX_HEADER_BYTES = 1000
MAX_PAYLOAD_BYTES = 100


def a_decoder() -> Decoder:
    return Decoder(ServerToCoordinator, max_payload_bytes=MAX_PAYLOAD_BYTES, max_header_bytes=MAX_HEADER_BYTES)


def a_payload(
    token_ids: tuple[int, ...] = (10, 11, 12),
    logprobs: tuple[float, ...] = (0.0, -0.5, -1.0),
    loss_mask: tuple[int, ...] = (0, 1, 1),
) -> bytes:
    """That fits a_group_header()."""
    return np.array(token_ids, "<i4").tobytes() + np.array(logprobs, "<f4").tobytes() + bytes(loss_mask)


# --- messages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNIONS)
def test_every_message_survives_the_wire_as_two_frames(name: str):
    decoder = Decoder(UNIONS[name], max_payload_bytes=0)
    for message in examples_of(UNIONS[name]):
        frames = encode(message)
        assert len(frames) == 2
        assert decoder.decode(frames) == (message, b"")


def test_the_payload_arrives_as_a_view_that_cannot_be_written():
    frames = encode(GroupsFinished(groups=(a_group_header(),)), bytearray(b"payload"))
    message, payload = a_decoder().decode(frames)
    assert (message, payload, payload.readonly) == (GroupsFinished(groups=(a_group_header(),)), b"payload", True)


@pytest.mark.parametrize("frames", [[], [b""], [b"", b"", b""]])
def test_another_number_of_frames_is_refused(frames: list[bytes]):
    with pytest.raises(ProtocolError, match=f"expected 2 frames, got {len(frames)}"):
        a_decoder().decode(frames)


def test_a_header_or_payload_over_its_limit_is_refused_before_it_is_parsed():
    fits = encode(GroupsFinished(groups=(a_group_header(),)), bytes(MAX_PAYLOAD_BYTES))
    assert len(a_decoder().decode(fits)[1]) == MAX_PAYLOAD_BYTES
    with pytest.raises(ProtocolError, match="payload: expected at most 100 bytes, got 101"):
        a_decoder().decode([fits[0], bytes(MAX_PAYLOAD_BYTES + 1)])
    with pytest.raises(ProtocolError, match="header: expected at most 1000 bytes, got 1001"):
        a_decoder().decode([bytes(MAX_HEADER_BYTES + 1), b""])


def test_a_payload_on_a_message_that_carries_none_is_refused():
    with pytest.raises(ProtocolError, match="Leaving carries no payload, got 1 bytes"):
        a_decoder().decode(encode(Leaving(reason=""), b"x"))


def test_a_message_of_another_direction_is_refused():
    with pytest.raises(ProtocolError, match="header: Invalid value 'TakeFrontier'"):
        a_decoder().decode(encode(TakeFrontier()))


def header_of(*values: object) -> bytes:
    return msgspec.msgpack.encode(values)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\xdd\xff\xff\xff\xff",  # an array of 2**32 - 1
        b"\xdf\xff\xff\xff\xff",  # a map of as many
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\x91" * 999,  # nested
        b"\x92\xa7Leaving\xa1\xff",  # not UTF-8
        b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00.",  # pickled
        header_of("Leaving", "x") + b"\x00",
        header_of("Leaving", "x", "y"),
        header_of("Leaving"),
        header_of("Leaving", None),
        header_of("Leaving", "x" * 5000)[:MAX_HEADER_BYTES],
        header_of("Hello", -1, "a", "b"),
        header_of("Hello", 1 << 60, "a", "b"),
        header_of("Hello", 1, "x" * 257, "b"),
        header_of("Heartbeat", 0, -2, 0, 0, 0.0, 0.0, ""),
        header_of("Heartbeat", 0, 0, 0, 0, float("nan"), 0.0, ""),
        header_of("Heartbeat", 0, 0, 0, 0, float("inf"), 0.0, ""),
        header_of("GroupsFinished", [[7, 5, []]]),
        header_of("GroupsFinished", [[7, 5, [[0, 1.0, True, 1, []]]]]),
        header_of("GroupsFinished", [[7, 5, [[3, float("nan"), True, 1, [[3, 2]]]]]]),
        header_of("GroupsFinished", [[7, 5, [[3, 1.0, True, 1, [[-1, 2]]]]]]),
        header_of("GroupsFinished", [[7, 5, [[3, 1.0, True, 1, [[3, 0]]]]]]),
        header_of("GroupsFinished", [[7, 5, [[3, 1.0, True, 1, [[3, 1, 1]]]]]]),
    ],
)
def test_a_header_that_no_correct_peer_sends_is_refused(header: bytes):
    with pytest.raises(ProtocolError, match=r"^header: "):
        a_decoder().decode([header, b""])


def test_a_header_nested_too_deeply_is_refused_wherever_any_value_may_stand():
    with pytest.raises(ProtocolError, match="header: maximum recursion depth exceeded"):
        Decoder(list[Any], max_payload_bytes=0).decode([b"\x91" * 100_000, b""])


def test_an_error_quotes_the_peer_briefly_and_without_control_characters():
    with pytest.raises(ProtocolError) as caught:
        a_decoder().decode([header_of("x\n\x1b[31mred" + "y" * 900), b""])
    assert str(caught.value).startswith("header: Invalid value 'x??[31mred")
    assert len(str(caught.value)) < 250


# --- groups ------------------------------------------------------------------------------------------------------


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    mask = np.array(draw(st.lists(st.booleans(), min_size=1, max_size=40).filter(any)))
    values = st.integers(0, (1 << 31) - 1)
    logprobs = st.floats(-(2.0**100), 0.0, width=32)
    count = mask.size

    def column(elements: st.SearchStrategy) -> np.ndarray:
        return np.array(draw(st.lists(elements, min_size=count, max_size=count)))

    return Trajectory(
        token_ids=column(values).astype(np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, column(logprobs), 0).astype(np.float32),
        token_versions=np.where(mask, column(st.one_of(st.integers(0, 3), values)), NOT_SAMPLED).astype(np.int32),
        reward=draw(st.floats(-1e9, 1e9)),
        finish_reason=draw(st.sampled_from(FinishReason)),
        turns=draw(st.integers(1, 100)),
    )


def contents(group: Group) -> list[object]:
    arrays = ("token_ids", "loss_mask", "behavior_logprobs", "token_versions")
    return [
        (group.lease_id, group.task_id),
        [[(getattr(t, name).dtype, getattr(t, name).tolist()) for name in arrays] for t in group.trajectories],
        [(t.reward, t.finish_reason, t.turns) for t in group.trajectories],
    ]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(trajectories(), min_size=1, max_size=3), min_size=1, max_size=3))
def test_groups_survive_the_wire_bit_for_bit(drawn: list[list[Trajectory]]):
    groups = [a_group(*trajectories, lease_id=number) for number, trajectories in enumerate(drawn)]
    halves = [pack_group(group) for group in groups]
    decoder = Decoder(GroupsFinished, max_payload_bytes=1 << 20)
    headers: list[GroupHeader] = []
    for header, payload in halves:
        message, _ = decoder.decode(encode(GroupsFinished(groups=(header,)), payload))
        assert isinstance(message, GroupsFinished)
        headers += message.groups
    unpacked = unpack_groups(headers, b"".join(payload for _, payload in halves))
    assert [contents(group) for group in unpacked] == [contents(group) for group in groups]


def test_versions_travel_as_runs_over_the_sampled_tokens():
    trajectory = a_trajectory(loss_mask=(False, True, True, False, True, True), versions=(3, 3, 3, 4))
    header, payload = pack_group(a_group(trajectory))
    assert header.trajectories[0].version_runs == ((3, 3), (4, 1))
    assert len(payload) == 6 * BYTES_PER_TOKEN


def test_arrays_are_read_only_and_share_the_payloads_memory():
    payload = bytearray(a_payload())
    [group] = unpack_groups([a_group_header()], payload)
    [trajectory] = group.trajectories
    for name in ("token_ids", "loss_mask", "behavior_logprobs", "token_versions"):
        assert not getattr(trajectory, name).flags.writeable
    payload[0] = 99
    assert trajectory.token_ids[0] == 99


@pytest.mark.parametrize(
    ("payload", "complaint"),
    [
        (a_payload()[:-1], "payload: expected 27 bytes for 3 tokens, got 26"),
        (a_payload() + b"\0", "payload: expected 27 bytes for 3 tokens, got 28"),
        (b"", "payload: expected 27 bytes for 3 tokens, got 0"),
        (a_payload(loss_mask=(0, 1, 2)), "trajectory 0.loss_mask: expected 0 or 1, got 2"),
        (a_payload(token_ids=(0, -1, 0)), "trajectory 0.token_ids: expected ids >= 0, got -1"),
        (a_payload(logprobs=(0, float("nan"), 0)), "behavior_logprobs: expected finite values, got nan"),
        (a_payload(logprobs=(float("nan"), 0, 0)), "behavior_logprobs: expected finite values, got nan"),
        (a_payload(logprobs=(0, float("-inf"), 0)), "behavior_logprobs: expected finite values, got -inf"),
        (a_payload(logprobs=(0, 2e-4, 0)), "behavior_logprobs: expected values <= 0, got 0.0002"),
        (a_payload(logprobs=(-1, -1, -1)), "behavior_logprobs: expected 0 where no token was sampled"),
        (a_payload(logprobs=(5e-5, -1, -1)), "behavior_logprobs: expected 0 where no token was sampled"),
        (a_payload(logprobs=(0, 0, 0), loss_mask=(0, 0, 0)), "trajectory 0: expected at least one sampled token"),
        (a_payload(loss_mask=(1, 1, 1)), "version_runs: expected to cover 3 sampled tokens, got 2"),
        (
            a_payload(logprobs=(0, 0, -1), loss_mask=(0, 0, 1)),
            "version_runs: expected to cover 1 sampled tokens, got 2",
        ),
    ],
)
def test_a_payload_that_no_correct_peer_sends_is_refused(payload: bytes, complaint: str):
    with pytest.raises(ProtocolError, match=complaint):
        unpack_groups([a_group_header()], payload)


def test_the_offending_trajectory_is_named():
    header, payload = pack_group(a_group())
    with pytest.raises(ProtocolError, match=r"trajectory 1.loss_mask: expected 0 or 1, got 7"):
        unpack_groups([header], payload[:-1] + b"\7")


def plausible(trajectory: TrajectoryHeader, ids: list[int], logprobs: list[float], mask: list[int]) -> bool:
    """One trajectory, token by token: what a group's columns are checked for all at once."""
    sampled = 0
    for token_id, logprob, is_sampled in zip(ids, logprobs, mask, strict=True):
        if token_id < 0 or is_sampled not in (0, 1):
            return False
        if math.isnan(logprob) or math.isinf(logprob) or logprob > LOGPROB_SLACK:
            return False
        if not is_sampled and logprob != 0:
            return False
        sampled += is_sampled
    return sampled > 0 and sum(length for _, length in trajectory.version_runs) == sampled


ODD_IDS = st.sampled_from((-1, -(1 << 31), (1 << 31) - 1, 0))
ODD_LOGPROBS = st.sampled_from((float("nan"), float("inf"), -float("inf"), 1.0, 2e-4, 5e-5, -0.0, 0.0, -1.0, -3e38))
ODD_FLAGS = st.sampled_from((0, 1, 2, 255))


@settings(max_examples=300, deadline=None)
@given(st.lists(trajectories(), min_size=1, max_size=4), st.data())
def test_a_group_is_refused_exactly_when_one_of_its_trajectories_would_be_and_that_one_is_named(drawn, data):
    header, payload = pack_group(a_group(*drawn))
    count = sum(len(trajectory) for trajectory in drawn)
    ids = np.frombuffer(payload, "<i4", count).copy()
    logprobs = np.frombuffer(payload, "<f4", count, 4 * count).copy()
    mask = np.frombuffer(payload, np.uint8, count, 8 * count).copy()
    for _ in range(data.draw(st.integers(0, 3))):
        column, odd = data.draw(st.sampled_from(((ids, ODD_IDS), (logprobs, ODD_LOGPROBS), (mask, ODD_FLAGS))))
        column[data.draw(st.integers(0, count - 1))] = data.draw(odd)
    bounds = list(accumulate((len(trajectory) for trajectory in drawn), initial=0))
    bad = [
        index
        for index, (start, end) in enumerate(pairwise(bounds))
        if not plausible(
            header.trajectories[index], ids[start:end].tolist(), logprobs[start:end].tolist(), mask[start:end].tolist()
        )
    ]
    damaged = ids.tobytes() + logprobs.tobytes() + mask.tobytes()
    if not bad:
        assert read_columns(header.trajectories, damaged).bounds == tuple(bounds)
        return
    with pytest.raises(ProtocolError) as refusal:
        read_columns(header.trajectories, damaged)
    assert int(str(refusal.value).removeprefix("trajectory ").split(".")[0].split(":")[0]) in bad


def test_a_log_probability_that_rounding_made_positive_is_zero():
    [group] = unpack_groups([a_group_header()], a_payload(logprobs=(0, 5e-5, -0.5)))
    logprobs = group.trajectories[0].behavior_logprobs
    assert (logprobs.tolist(), logprobs.dtype, logprobs.flags.writeable) == ([0, 0, -0.5], np.float32, False)


@pytest.mark.parametrize(
    ("limits", "complaint"),
    [
        ({"group_size": 3}, "group: expected 3 trajectories, got 2"),
        ({"max_model_len": 2}, "trajectory 0: expected at most 2 tokens, got 3"),
        ({"newest_version": 3}, "trajectory 0: sampled by version 4, the newest is 3"),
    ],
)
def test_a_group_that_this_run_cannot_have_asked_for_is_refused(limits: dict[str, int], complaint: str):
    fitting = {"max_model_len": 3, "group_size": 2, "newest_version": 4}
    header, _ = pack_group(a_group())
    check_group(header, **fitting)
    with pytest.raises(ProtocolError, match=complaint):
        check_group(header, **(fitting | limits))


def test_ids_beyond_the_vocabulary_are_found_in_a_later_trajectory_too():
    larger = replace(a_trajectory(), token_ids=np.array([1, 2, 50], np.int32))
    header, payload = pack_group(a_group(a_trajectory(), larger))
    columns = read_columns(header.trajectories, payload)
    check_vocabulary(columns, 51)
    with pytest.raises(ProtocolError, match=r"trajectory 1.token_ids: expected ids < 50, got 50"):
        check_vocabulary(columns, 50)


@pytest.mark.parametrize(
    ("continues", "is_fine"),
    [((False, True, False), True), ((False, False, True), True), ((False,) * 3, False), ((True, False, False), False)],
)
def test_parts_of_a_forked_episode_follow_it_and_do_not_count_as_episodes(continues: tuple[bool, ...], is_fine: bool):
    group = a_group(*(replace(a_trajectory(), continues=each) for each in continues))
    header, payload = pack_group(group)
    assert [each.continues for each in unpack_groups([header], payload)[0].trajectories] == list(continues)
    limits = {"max_model_len": 3, "group_size": 2, "newest_version": 4}
    if is_fine:
        check_group(header, **limits)
        return
    with pytest.raises(ProtocolError, match="group: expected 2 trajectories"):
        check_group(header, **limits)
