from common.snapshot import TensorSpec, build_manifest
from rollout_server.pulling import CHUNKS_IN_FLIGHT, PullState


def a_pull(num_chunks: int = 20) -> PullState:
    tensors = (TensorSpec("weight", (num_chunks,), "float32", 0),)
    manifest = build_manifest(memoryview(bytes(4 * num_chunks)), tensors, run_id="run", version=1, chunk_bytes=4)
    return PullState(manifest=manifest, version=1, timeout_s=1.0, heard_s=0.0)


def test_a_window_of_chunks_is_asked_for_and_one_more_for_each_that_arrives():
    pull = a_pull()
    assert pull.next_requests(0.0) == list(range(CHUNKS_IN_FLIGHT))
    assert pull.next_requests(0.0) == []
    pull.arrived(0, 4, 0.1)
    assert pull.next_requests(0.1) == [CHUNKS_IN_FLIGHT]


def test_what_was_asked_for_before_something_that_arrived_is_lost_and_asked_for_again():
    pull = a_pull()
    pull.next_requests(0.0)
    pull.arrived(2, 4, 0.1)
    assert pull.next_requests(0.1) == [0, 1, CHUNKS_IN_FLIGHT]
    pull.arrived(3, 4, 0.2)
    assert 0 not in pull.next_requests(0.2)  # asked for again after 3 was: it may still come


def test_while_anything_arrives_nothing_is_asked_for_again():
    pull = a_pull()
    pull.next_requests(0.0)
    for index, now_s in enumerate((0.9, 1.8, 2.7)):
        pull.arrived(index, 4, now_s)
        assert pull.next_requests(now_s) == [CHUNKS_IN_FLIGHT + index]


def test_after_silence_all_that_is_out_is_asked_for_again_and_the_patience_doubles_each_time():
    pull = a_pull(3)
    pull.next_requests(0.0)
    assert pull.next_requests(1.0) == []
    assert pull.next_requests(1.1) == [0, 1, 2]
    assert pull.next_requests(3.0) == []
    assert pull.next_requests(3.2) == [0, 1, 2]
    assert pull.num_asked_again == 6


def test_a_damaged_chunk_is_asked_for_again_at_once():
    pull = a_pull(3)
    pull.next_requests(0.0)
    pull.damaged(0, 0.1)
    assert pull.next_requests(0.1) == [0]
    assert pull.missing == {0, 1, 2}
