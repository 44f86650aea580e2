"""Pushes from a real snapshot server process to receivers over real sockets. `make push-storm` is the long form."""

import pytest

from rollout_server import pulled_snapshots
from tests.weights.fleet import a_fleet
from tests.weights.push_storm import FULL_EVERY, NUM_MEMBERS, push_storm

PATIENCE_S = 60.0
PUSHES = 20
REPLY_TIMEOUT_S = 0.75  # what is only late on a busy machine is not to be asked for again


async def test_pushes_cut_at_random_bytes_leave_every_receiver_at_exactly_the_published_version(tmp_path, monkeypatch):
    monkeypatch.setattr(pulled_snapshots, "REPLY_TIMEOUT_S", REPLY_TIMEOUT_S)
    outcome = await push_storm(PUSHES, tmp_path, patience_s=PATIENCE_S)
    assert outcome.cuts == NUM_MEMBERS * PUSHES
    assert outcome.mixed == 0
    assert outcome.full == NUM_MEMBERS * PUSHES // FULL_EVERY
    assert outcome.deltas == NUM_MEMBERS * PUSHES - outcome.full
    assert outcome.most_over_bound <= 0  # of bytes sent again


async def test_a_delta_carries_what_changed_and_its_engine_touches_nothing_else(tmp_path):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet:
        [member] = fleet.members
        first = await fleet.publish(0.0)
        await fleet.deliver()
        second = await fleet.publish(0.01)
        await fleet.deliver()
        assert (first.delta_bytes, second.full_bytes) == (None, first.full_bytes)
        assert second.delta_bytes is not None
        assert second.delta_bytes < 0.02 * second.full_bytes
        assert member.receiver.received_bytes == first.full_bytes + second.delta_bytes
        assert (member.engine.loads_by_changes, member.engine.mixed) == (1, [])


async def test_an_empty_delta_is_a_few_bytes_and_a_version_all_the_same(tmp_path):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet:
        for _ in range(2):
            ready = await fleet.publish(0.0)
            await fleet.deliver()
        assert ready.delta_bytes is not None
        assert ready.delta_bytes < 100
        assert fleet.members[0].engine.loaded_version == 1
        assert fleet.members[0].engine.loads_by_changes == 1


async def test_a_late_joiner_pulls_the_newest_full_snapshot_and_follows_by_deltas_from_there(tmp_path):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet:
        for _ in range(3):
            await fleet.publish(0.01)
            await fleet.deliver()
        late = await fleet.join()
        await fleet.deliver()
        assert (late.receiver.full_loaded, late.receiver.deltas_loaded) == (1, 0)
        ready = await fleet.publish(0.01)
        await fleet.deliver()
        assert (late.receiver.full_loaded, late.receiver.deltas_loaded) == (1, 1)
        assert late.engine.mixed == []
        assert ready.full_pulls == {"no base": 2}


async def test_a_server_some_versions_behind_goes_on_by_one_delta_after_the_other(tmp_path):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet:
        await fleet.publish(0.01)
        await fleet.deliver()
        for _ in range(3):
            await fleet.publish(0.01)
        await fleet.deliver()
        [member] = fleet.members
        assert (member.receiver.full_loaded, member.receiver.deltas_loaded) == (1, 3)
        assert member.engine.mixed == []


@pytest.mark.parametrize(("times", "why"), [(1, "a delta does not pay"), (2, "base is gone")])
async def test_why_a_server_with_a_base_pulls_everything_is_said_and_counted(tmp_path, caplog, times, why):
    caplog.set_level("INFO")
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S) as fleet:
        await fleet.publish(0.01)
        await fleet.deliver()
        for _ in range(times):
            await fleet.publish(None)  # cuts the chain of deltas
        await fleet.deliver()
        ready = await fleet.publish(0.01)
        assert ready.full_pulls == {"no base": 1, why: 1}
        assert fleet.members[0].engine.mixed == []
    assert f"(full, {why})" in caplog.text
