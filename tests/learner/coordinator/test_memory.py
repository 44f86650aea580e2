"""The coordinator as a real process whose learner has stopped: its memory is bounded, whatever servers do."""

import time

from common.events import read_events
from learner.coordinator.batch_receiver import BatchReceiver
from learner.coordinator.messages import TakeBatch
from tests.benchmarks.dataplane_groups import group_bytes
from tests.benchmarks.dataplane_parties import Case, a_coordinator, memory_bytes, senders, settings_for
from tests.benchmarks.dataplane_runs import ingress_bytes, run_memory
from tests.benchmarks.dataplane_workload import Plan

TIMEOUT_S = 30.0
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
    assert status.servers_wait_for.startswith(words)
    assert any(told.startswith(words) for told in memory.good.waiting_for), memory.good.waiting_for


def test_a_batch_that_the_learner_does_not_read_takes_no_memory_beside_the_queue(tmp_path):
    num_groups = QUEUE_BYTES // group_bytes(4)
    case = Case(group_size=4, step_trajectories=3 * num_groups, max_staleness=2)  # three quarters of the queue
    settings = settings_for(case, tmp_path, queue_bytes=QUEUE_BYTES, event_log=str(tmp_path / "events"))
    with a_coordinator("durable", settings, tmp_path) as running:
        running.learner.say(TakeBatch(version=0))
        plan = Plan(address=running.address, group_size=4, names=("good",))
        with senders("servers", plan, tmp_path):
            wait_for_a_full_queue(tmp_path / "events")
        bound = QUEUE_BYTES + ingress_bytes(num_servers=1, group_size=4)
        assert memory_bytes(running.pid, "VmHWM") < bound + BESIDE_QUEUE_BYTES
        receiver, is_complete = BatchReceiver(), False
        while not is_complete:
            is_complete = receiver.add(*running.learner.hear_part())
        assert len(receiver.take()) == case.groups_per_step


def wait_for_a_full_queue(events):
    deadline = time.monotonic() + TIMEOUT_S
    while not any(event.get("queued_bytes", 0) > QUEUE_BYTES - group_bytes(4) for event in read_events([events])):
        assert time.monotonic() < deadline
        time.sleep(0.1)
