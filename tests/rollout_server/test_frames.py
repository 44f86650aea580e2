import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_server.environments.frames import Call, FrameBuffer, FrameError, Outcome, pack


@given(sizes=st.lists(st.integers(0, 300), max_size=20), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(sizes, cuts):
    outcomes = [Outcome(index, None, "environment_error", "x" * size) for index, size in enumerate(sizes)]
    stream = b"".join(map(pack, outcomes))
    frames, received, start = FrameBuffer(), [], 0
    while start < len(stream):
        end = start + cuts[start % len(cuts)]
        received += frames.feed(stream[start:end])
        start = end
    assert [msgspec.json.decode(frame, type=Outcome) for frame in received] == outcomes


def test_a_length_over_the_limit_is_an_error_before_anything_is_stored():
    with pytest.raises(FrameError, match="a frame of 11 bytes was announced, at most 10 fit"):
        list(FrameBuffer(max_frame_bytes=10).feed(b"\x0b\x00\x00\x00"))


@pytest.mark.parametrize(
    "body", [b"[1,1e10]", b"[1,true]", b'[1,"1"]', b"[1,NaN]", b"[1,0.5,null,0]", b"{}", b'[1,null,"kind"]']
)
def test_an_outcome_that_is_not_one_is_refused(body):
    with pytest.raises(msgspec.MsgspecError):
        msgspec.json.decode(body, type=Outcome)


def test_a_row_travels_byte_for_byte():
    row = b'{"prompt": "h\\u00e9",  "n": 1.0}'
    (frame,) = FrameBuffer().feed(pack([Call(0, "p", "c", msgspec.Raw(row))]))
    (call,) = msgspec.json.decode(frame, type=list[Call])
    assert bytes(call.row) == row
