"""The coordinator as a real process whose learner has stopped: its memory is bounded, whatever servers do."""

from tests.benchmarks.dataplane_groups import group_bytes
from tests.benchmarks.dataplane_runs import run_memory

MIB = 1 << 20
QUEUE_BYTES = 64 * MIB
COPIES = 16
BESIDE_QUEUE_BYTES = 64 * MIB  # the interpreter and everything it has loaded included


def test_with_the_learner_stopped_the_process_stays_within_its_bound_and_servers_are_stopped_by_credits(tmp_path):
    memory = run_memory(tmp_path, queue_bytes=QUEUE_BYTES, copies=COPIES)
    status = memory.status
    assert memory.sent_bytes > 8 * QUEUE_BYTES
    assert memory.peak_rss < QUEUE_BYTES + memory.ingress_bytes + BESIDE_QUEUE_BYTES
    assert QUEUE_BYTES - group_bytes(4) < status.queued_bytes <= QUEUE_BYTES
    # Credits stop servers, not drops: what was leased is queued, but for what the floods had.
    assert set(status.cancelled) <= {"quarantined"}
    assert status.leased == status.queued + sum(status.cancelled.values())
    assert (status.failed, status.expired) == ({}, 0)
    words = f"the learner to empty the queue: {status.queued_bytes + group_bytes(4)} of {QUEUE_BYTES} bytes"
    assert (status.held_by, status.waiting_for) == ("queue_bytes", "")
    assert all(told.startswith(words) for told in (status.servers_wait_for, *memory.good.waiting_for))
