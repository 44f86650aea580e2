"""What every way of bringing weights to servers has to hold, on each of them. Deltas are in test_pushes.py."""

import asyncio
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import shared_slots
from common.shared_slots import NotSharedError, create_slot, lock_to_read, lock_to_write, open_slot_of, unlock
from common.wire import open_dealer
from learner import slots as slots_module
from learner.publisher import NUM_SLOTS
from rollout_server import mapped_snapshots, weight_receiver
from rollout_server.inference import LocalSnapshot, WeightUpdate
from rollout_server.nearest_snapshots import TransportName
from tests.weights.fleet import RUN_ID, DoubtingEngine, Fleet, a_fleet

PATIENCE_S = 60.0


@pytest.fixture(params=["zeromq", "shared_memory", "relayed"])
def transport(request: pytest.FixtureRequest) -> TransportName:
    return request.param


async def test_every_version_arrives_bit_for_bit_whether_little_changed_or_much(tmp_path: Path, transport):
    async with a_fleet(tmp_path, num_members=3, patience_s=PATIENCE_S, transport=transport) as fleet:
        for share in (0.0, 0.01, 0.0, None, 0.05, None, 0.01):
            await fleet.publish(share)
            await fleet.deliver()
        for member in fleet.members:
            assert (member.engine.loaded_version, member.engine.mixed) == (6, [])


async def test_a_late_joiner_gets_the_newest_version_and_the_others_do_not_notice(tmp_path: Path, transport):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport=transport) as fleet:
        for _ in range(3):
            await fleet.publish(0.01)
            await fleet.deliver()
        late = await fleet.join(transport)
        assert fleet.publisher.skipped_versions == 0
        await fleet.publish(0.01)
        await fleet.deliver()
        for member in (*fleet.members, late):
            assert (member.engine.loaded_version, member.engine.mixed) == (3, [])
        assert fleet.publisher.skipped_versions == 0


async def test_a_server_that_was_away_for_some_versions_ends_at_the_newest(tmp_path: Path, transport):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport=transport) as fleet:
        await fleet.publish(0.01)
        await fleet.deliver()
        for _ in range(6):
            await fleet.publish(None)
        await fleet.deliver()
        [member] = fleet.members
        assert (member.engine.loaded_version, member.engine.mixed) == (6, [])


async def test_weights_of_another_run_are_refused_by_name(tmp_path: Path, transport, caplog, monkeypatch):
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.02)
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport=transport) as fleet:
        [member] = fleet.members
        await member.receiver.follow("another.1")
        await fleet.publish(0.0)
        await member.receiver.announce(0)
        while f"snapshot 0 is of run {RUN_ID}, not of another.1" not in caplog.text:
            await asyncio.sleep(0.01)
        assert member.receiver.loaded_version == -1
        await member.receiver.follow(RUN_ID)
        await fleet.deliver()


class SlowEngine(DoubtingEngine):
    """Stops in the middle of a load until it is told to go on."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet.weights)
        self.is_reading = asyncio.Event()
        self.may_go_on = asyncio.Event()

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        self.is_reading.set()
        await self.may_go_on.wait()
        return await super().load_weights(snapshot)


@pytest.mark.parametrize("kept_s", [1e9, 0.0])
async def test_a_server_that_stops_while_it_reads_a_version_delays_no_other_and_reads_that_version_whole(
    tmp_path: Path, transport, monkeypatch, kept_s
):
    """kept_s: after how long its memory is given up and replaced, so that it cannot even cost the learner a slot."""
    monkeypatch.setattr(slots_module, "KEPT_S", kept_s)
    async with a_fleet(tmp_path, num_members=2, patience_s=PATIENCE_S, transport=transport) as fleet:
        slow = SlowEngine(fleet)
        receiver = (await fleet.join(transport, slow)).receiver
        fleet.members.pop()  # it is not waited for
        await fleet.publish(None)
        await receiver.announce(0)
        for member in fleet.members:
            await member.receiver.announce(0)
        await slow.is_reading.wait()
        for _ in range(8):
            await fleet.publish(None)
            await fleet.deliver()
        assert slow.loaded_version == -1
        slow.may_go_on.set()
        await receiver.wait_for_version(0)
        assert slow.mixed == []
        await receiver.announce(8)
        await receiver.wait_for_version(8)
        assert slow.mixed == []
        for member in fleet.members:
            assert (member.engine.loaded_version, member.engine.mixed) == (8, [])


async def test_a_restarted_learner_is_followed_at_whatever_version_it_goes_on(tmp_path: Path, transport):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport=transport) as former:
        for _ in range(3):
            await former.publish(0.01)
            await former.deliver()
        engine, receiver = former.members[0].engine, former.members[0].receiver
        async with a_fleet(tmp_path / "again", num_members=0, patience_s=PATIENCE_S, run_id="run.2") as resumed:
            engine._weights = resumed.weights
            resumed.version = 1  # of its checkpoint
            await resumed.publish(0.01)
            former.stop_following()
            async with open_dealer(resumed.publisher.address) as dealer, asyncio.TaskGroup() as tasks:
                await receiver.follow("run.2")
                running = tasks.create_task(receiver.run(dealer))
                for version in (2, 3):
                    await receiver.announce(version)
                    await receiver.wait_for_version(version)
                    assert (engine.loaded_version, engine.mixed) == (version, [])
                    if version == 2:
                        await resumed.publish(0.01)
                running.cancel()


async def test_a_server_on_the_learners_host_shares_its_memory_and_pulls_nothing(tmp_path: Path):
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport="nearest") as fleet:
        for _ in range(3):
            await fleet.publish(0.05)
            await fleet.deliver()
        [member] = fleet.members
        assert member.receiver.received_bytes == 0
        assert member.engine.mixed == []


async def test_memory_that_the_learner_has_replaced_is_let_go_of(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(slots_module, "KEPT_S", 0.0)
    monkeypatch.setattr(slots_module, "KEPT_BYTES_PER_S", 1e15)
    gc.collect()
    before = Path("/proc/self/maps").read_text().count(f"/memfd:{shared_slots.SLOT_NAME}")
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport="shared_memory") as fleet:
        [member] = fleet.members
        for version in range(8):
            held = [os.open(f"/proc/self/fd/{slot}", os.O_RDONLY) for slot in fleet.publisher._slots.descriptors]
            assert all(map(lock_to_read, held))
            while (slot := fleet.publisher.take_slot()) is None:  # the first look begins the wait
                await asyncio.sleep(0.01)
            fleet.publisher._slots.let_read(slot)
            fleet.publisher._free.insert(0, slot)
            for descriptor in held:
                os.close(descriptor)
            await fleet.publish(0.01)
            await fleet.deliver()
            assert member.engine.loaded_version == version
        gc.collect()
        mapped = Path("/proc/self/maps").read_text().count(f"/memfd:{shared_slots.SLOT_NAME}") - before
    assert mapped <= 2 * NUM_SLOTS  # the learner's own, and the member's


@pytest.mark.parametrize("why", ["the learner is on another host", "is not the memory that was offered"])
async def test_where_memory_cannot_be_shared_weights_come_over_zeromq_and_it_is_said(
    tmp_path: Path, caplog, monkeypatch, why
):
    caplog.set_level("INFO")
    if "host" in why:
        monkeypatch.setattr(mapped_snapshots, "host_id", lambda: "another machine")
    else:  # as if process numbers meant something else here than where the learner runs
        monkeypatch.setattr(
            mapped_snapshots, "open_slot_of", lambda process, *rest: open_slot_of(os.getpid(), 0, *rest[1:])
        )
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport="nearest") as fleet:
        ready = await fleet.publish(0.05)
        await fleet.deliver()
        [member] = fleet.members
        assert member.receiver.received_bytes == ready.full_bytes
    assert f"weights come over {member.proxy.address}: " in caplog.text
    assert why in caplog.text


async def test_memory_that_is_never_what_its_manifest_says_is_given_up_for_zeromq(tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(weight_receiver, "ASK_AGAIN_S", 0.02)
    caplog.set_level("INFO")
    async with a_fleet(tmp_path, num_members=1, patience_s=PATIENCE_S, transport="nearest") as fleet:
        await fleet.publish(0.05)
        for mapping in fleet.publisher._slots._mappings:  # after the digests were taken
            mapping[1000] ^= 4
        for member in fleet.members:
            await member.receiver.announce(0)
        while "the learner's memory is not what its manifest says" not in caplog.text:
            await asyncio.sleep(0.01)
        assert fleet.members[0].engine.loaded_version == -1


READER = """
import sys
from common.shared_slots import lock_to_read, open_slot_of
slot = open_slot_of(*map(int, sys.argv[1:]))
assert lock_to_read(slot)
print("reading", flush=True)
sys.stdin.read()
"""


def test_a_slot_is_not_written_while_a_process_reads_it_and_is_as_soon_as_that_is_killed():
    slot = create_slot(4096)
    arguments = [os.getpid(), slot, os.fstat(slot).st_ino, 4096]
    command = [sys.executable, "-c", READER, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline() == b"reading\n"
        assert not lock_to_write(slot)
        reader.kill()
        reader.wait(timeout=10)
        assert lock_to_write(slot)
    own = open_slot_of(*arguments)
    assert not lock_to_read(own)
    unlock(slot)
    assert lock_to_read(own)
    os.close(own)
    os.close(slot)


def test_memory_that_is_not_a_slot_of_ours_is_not_mapped(tmp_path: Path, monkeypatch):
    slot = create_slot(4096)
    inode = os.fstat(slot).st_ino
    with pytest.raises(NotSharedError, match="cannot be opened: No such file or directory"):
        open_slot_of(os.getpid(), 1 << 20, inode, 4096)
    with pytest.raises(NotSharedError, match="has 4096 bytes, the snapshot 8192"):
        open_slot_of(os.getpid(), slot, inode, 8192)
    with pytest.raises(NotSharedError, match="is not the memory that was offered"):
        open_slot_of(os.getpid(), slot, inode + 1, 4096)
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(4096))
        file.flush()
        number = os.fstat(file.fileno()).st_ino
        with pytest.raises(NotSharedError, match="is not the memory that was offered"):
            open_slot_of(os.getpid(), file.fileno(), number, 4096)
    unsealed = os.memfd_create(shared_slots.SLOT_NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(NotSharedError, match=r"the length of .* is not sealed"):
        open_slot_of(os.getpid(), unsealed, os.fstat(unsealed).st_ino, 4096)
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(NotSharedError, match=f"belongs to user {own}, this process to user {own + 1}"):
        open_slot_of(os.getpid(), slot, inode, 4096)
    os.close(slot)
    os.close(unsealed)
