"""The coordinator over real ZeroMQ, and as a real process, with a fake server and a fake learner."""

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.codec import encode, pack_group, unpack_groups
from common.events import read_events
from common.keys import ensure_client_key, ensure_server_keys, load_client_key
from common.lifecycle import UserError
from common.messages import (
    CoordinatorToServer,
    Finished,
    GroupRefused,
    GroupsAccepted,
    GroupsFinished,
    Lease,
    Pulse,
    Refused,
    Welcome,
)
from common.trajectory import FinishReason, Group, Trajectory
from common.wire import curve_keypair, open_dealer
from learner.coordinator.batch_receiver import BatchReceiver
from learner.coordinator.delivery import LearnerError
from learner.coordinator.journal import BatchRecord, Journal
from learner.coordinator.journal_keeper import JournalKeeper
from learner.coordinator.lender import Lender
from learner.coordinator.messages import (
    Batch,
    CheckpointSaved,
    CloseRun,
    CoordinatorStatus,
    Frontier,
    RunOpened,
    SnapshotPublished,
    StepCompleted,
    TakeBatch,
    TakeFrontier,
)
from learner.coordinator.rows import DataError
from learner.coordinator.service import Service
from learner.coordinator.service_settings import read_settings, write_settings
from learner.coordinator.serving import serve
from learner.coordinator.tasks import open_tasks
from learner.coordinator.turns import TURN_S
from tests.builders_coordinator import (
    a_heartbeat,
    a_hello,
    a_ready,
    a_sampled_group,
    an_open_run,
    some_settings,
)
from tests.builders_coordinator_service import (
    Party,
    a_coordinator_serving,
    a_learner,
    a_server,
    finish,
    settings_in,
)


def a_long_group(lease, *, num_tokens):
    rng = np.random.default_rng(lease.lease_id)
    trajectory = Trajectory(
        token_ids=rng.integers(0, 100, num_tokens, dtype=np.int32),
        loss_mask=np.ones(num_tokens, np.bool_),
        behavior_logprobs=-rng.random(num_tokens, dtype=np.float32),
        token_versions=np.zeros(num_tokens, np.int32),
        reward=1.0,
        finish_reason=FinishReason.TERMINATED,
    )
    return Group(lease_id=lease.lease_id, task_id=lease.task_id, trajectories=(trajectory,))


async def test_a_group_goes_from_its_lease_into_the_batch_and_is_trained(tmp_path):
    settings = settings_in(tmp_path, event_log=str(tmp_path / "events"))
    async with a_coordinator_serving(settings) as (learner, address), a_server(address) as server:
        leases = [await server.expect(Lease) for _ in range(4)]
        assert [lease.lease_id for lease in leases] == [0, 1, 2, 3]
        assert len({lease.row for lease in leases}) == 4
        await learner.say(TakeBatch(version=0))
        for lease in (leases[1], leases[0]):
            await finish(server, lease)
            assert await server.expect(GroupsAccepted) == GroupsAccepted(lease_ids=(lease.lease_id,))
        batch, payload = await learner.hear(Batch)
        groups = unpack_groups(batch.groups, payload)
        assert (batch.version, [group.lease_id for group in groups]) == (0, [0, 1])
        assert [float(group.trajectories[0].behavior_logprobs[2]) for group in groups] == [-1.0, -2.0]
        await learner.say(StepCompleted(version=1, lease_ids=(0, 1)))
        more = [await server.expect(Lease) for _ in range(2)]
        assert [(lease.lease_id, lease.min_version) for lease in more] == [(4, 1), (5, 1)]
        await learner.say(SnapshotPublished(version=1))
        while (await server.expect(Pulse)).published_version != 1:
            pass
        status = await learner.expect(CoordinatorStatus)
        assert (status.leased, status.running, status.trained) == (6, 4, 2)
        await learner.say(CloseRun(reason="enough"))
        assert await server.expect(Finished) == Finished(reason="enough")
    kinds = {event["kind"] for event in read_events([tmp_path / "events"])}
    assert kinds == {"batch_delivered", "coordinator_status"}


async def test_a_batch_of_large_groups_arrives_in_parts_with_every_byte(tmp_path):
    settings = settings_in(tmp_path, rules=some_settings(max_group_bytes=1 << 20, queue_bytes=1 << 23), group_size=1)
    run = an_open_run(max_model_len=60_000)
    async with a_coordinator_serving(settings, run) as (learner, address), a_server(address) as server:
        sent = [a_long_group(await server.expect(Lease), num_tokens=50_000) for _ in range(2)]
        for group in sent:
            header, payload = pack_group(group)
            await server.say(GroupsFinished(groups=(header,)), payload)
        await learner.say(TakeBatch(version=0))
        receiver = BatchReceiver()
        assert not receiver.add(*await learner.hear(Batch))
        assert receiver.add(*await learner.hear(Batch))
    assert [pack_group(group) for group in receiver.take()] == [pack_group(group) for group in sent]


async def test_a_group_that_is_resent_is_refused_as_a_duplicate(tmp_path):
    async with a_coordinator_serving(settings_in(tmp_path)) as (_, address), a_server(address) as server:
        lease = await server.expect(Lease)
        await finish(server, lease)
        await finish(server, lease)
        await server.expect(GroupsAccepted)
        assert "was accepted before" in (await server.expect(GroupRefused)).reason


async def test_a_group_of_equal_rewards_is_acknowledged_and_its_task_not_leased_again_by_the_next_coordinator(tmp_path):
    settings = settings_in(tmp_path, rules=some_settings(max_staleness=0, max_filtered=2))
    async with a_coordinator_serving(settings) as (_, address), a_server(address) as server:
        leases = [await server.expect(Lease) for _ in range(2)]
        group = a_sampled_group(leases[0].lease_id, leases[0].task_id)
        equal = tuple(replace(trajectory, reward=0.5) for trajectory in group.trajectories)
        header, payload = pack_group(replace(group, trajectories=equal))
        await server.say(GroupsFinished(groups=(header,)), payload)
        answers = await server.everything_until(GroupsAccepted)
        refill = next((each for each in answers if isinstance(each, Lease)), None) or await server.expect(Lease)
        assert (answers[-1].lease_ids, refill.task_id) == ((0,), 2)
    async with a_coordinator_serving(settings) as (_, address), a_server(address, epoch="epoch-2") as server:
        assert [(await server.expect(Lease)).task_id for _ in range(2)] == [1, 2]


async def test_a_server_out_of_service_is_named_with_its_reason_and_granted_leases_again_when_it_is_back(
    tmp_path, caplog
):
    async with a_coordinator_serving(settings_in(tmp_path)) as (learner, address), a_server(address) as server:
        tasks = [(await server.expect(Lease)).task_id for _ in range(4)]
        await server.say(a_heartbeat(out_of_service="its weights are wrong"))
        await server.say(a_heartbeat(out_of_service="its weights are wrong"))
        while not (status := await learner.expect(CoordinatorStatus)).failed:
            pass
        assert (status.failed, status.running) == ({"out_of_service": 4}, 0)
        assert status.waiting_for == "server a is out of service: its weights are wrong"
        await server.say(a_heartbeat())
        again = [(await server.expect(Lease)).task_id for _ in range(4)]
    assert set(again) & set(tasks)  # among others, that did not just fail
    assert caplog.text.count("server a is out of service: its weights are wrong") == 1
    assert "server a is back in service at version 0" in caplog.text


async def test_a_server_that_gets_thousands_of_leases_at_once_is_given_the_time_to_read_them(tmp_path):
    rules = some_settings(groups_per_step=2000, queue_groups=4000, queue_bytes=1 << 30)
    prompts = tmp_path / "long.jsonl"
    prompts.write_text(json.dumps({"prompt": "x" * 10_000}))
    settings = settings_in(tmp_path, rules=rules, prompts=str(prompts))
    async with a_coordinator_serving(settings) as (learner, address), open_dealer(address) as dealer:
        server = Party(dealer, CoordinatorToServer)
        await server.ask(a_hello(), Welcome)
        await server.say(a_ready(capacity_groups=4000))
        while (await learner.expect(CoordinatorStatus)).running < 4000:
            pass
        await learner.expect(CoordinatorStatus)  # time for them to pile up
        assert {(await server.expect(Lease)).lease_id for _ in range(4000)} == set(range(4000))


async def test_nothing_is_acknowledged_or_delivered_before_the_journal_has_it(tmp_path, monkeypatch):
    disk_is_ready = asyncio.Event()
    keep = JournalKeeper.keep

    async def slow_keep(keeper, records, *arguments):
        if records:
            await disk_is_ready.wait()
        return await keep(keeper, records, *arguments)

    monkeypatch.setattr(JournalKeeper, "keep", slow_keep)
    async with a_coordinator_serving(settings_in(tmp_path)) as (learner, address), a_server(address) as server:
        for _ in range(2):
            lease = await server.expect(Lease)
            await finish(server, lease)
            await finish(server, lease)  # a duplicate must not be told either that the group is safe
        await learner.say(TakeBatch(version=0))
        while (await learner.expect(CoordinatorStatus)).queued < 2:
            pass
        await learner.ask(TakeFrontier(), Frontier)  # everything decided until now would have been said before this
        await server.say(a_heartbeat())
        heard = await server.everything_until(Pulse)
        assert not {type(message) for message in heard} & {GroupsAccepted, GroupRefused}
        disk_is_ready.set()
        await server.expect(GroupsAccepted)
        assert (await learner.expect(Batch)).version == 0


async def test_what_was_decided_before_the_run_is_closed_is_in_the_journal(tmp_path, monkeypatch):
    """Also what comes while the disk is busy: here a checkpoint, whose groups nobody needs any more."""
    keep, disk_is_busy, learner_is_done = JournalKeeper.keep, asyncio.Event(), asyncio.Event()

    async def slow_keep(keeper, records, *arguments):
        if any(isinstance(record, BatchRecord) for record in records):
            monkeypatch.setattr(JournalKeeper, "keep", slower_keep)
        await keep(keeper, records, *arguments)

    async def slower_keep(keeper, *arguments):
        disk_is_busy.set()
        await learner_is_done.wait()
        await keep(keeper, *arguments)

    monkeypatch.setattr(JournalKeeper, "keep", slow_keep)
    settings = settings_in(tmp_path)
    async with a_coordinator_serving(settings) as (learner, address), a_server(address) as server:
        await learner.say(TakeBatch(version=0))
        *first, last = [await server.expect(Lease) for _ in range(3)]
        for lease in first:
            await finish(server, lease)
        await learner.expect(Batch)
        await finish(server, last)
        await disk_is_busy.wait()
        await learner.say(StepCompleted(version=1, lease_ids=(0, 1)))
        await learner.ask(TakeFrontier(), Frontier)
        await learner.say(CheckpointSaved(version=1))
        await learner.say(CloseRun(reason="enough"))
        await server.expect(Finished)
        learner_is_done.set()
    journal = Journal(Path(settings.journal), lineage="later")
    assert [group.lease_id for group in journal.contents().groups] == [2]
    journal.close()


def hear_slowly(monkeypatch, seconds, note=lambda: None):
    """Each message that is heard takes so long; note() is called before it."""
    hear = Service._hear_server

    def slow_hear(service, incoming):
        note()
        time.sleep(seconds)
        hear(service, incoming)

    monkeypatch.setattr(Service, "_hear_server", slow_hear)


def heartbeats():
    return a_heartbeat(), b"", Pulse


def groups_without_leases():
    header, payload = pack_group(a_sampled_group(1 << 20, 0))
    return GroupsFinished(groups=(header,)), payload, GroupRefused


@pytest.mark.parametrize("kind", [heartbeats, groups_without_leases])
async def test_others_have_a_turn_while_a_burst_of_servers_messages_is_heard(tmp_path, monkeypatch, kind):
    turns, heard_in = 0, []

    async def count_turns():
        nonlocal turns
        while len(heard_in) < 50:
            turns += 1
            await asyncio.sleep(0)

    hear_slowly(monkeypatch, 2 * TURN_S, note=lambda: heard_in.append(turns))
    patient = settings_in(tmp_path, rules=some_settings(max_offences=1000))
    async with a_coordinator_serving(patient) as (_, address), a_server(address) as server:
        await server.expect(Lease)
        heard_in.clear()
        message, payload, answer = kind()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(50):
                await server.say(message, payload)
            tasks.create_task(count_turns())
            for _ in range(50):
                await server.expect(answer)
    assert len(set(heard_in[:50])) == 50


async def test_a_heartbeat_is_answered_before_the_groups_that_were_sent_before_it(tmp_path, monkeypatch):
    patient = settings_in(tmp_path, rules=some_settings(max_offences=1000))
    async with a_coordinator_serving(patient) as (_, address), a_server(address) as server:
        await server.expect(Lease)
        await server.ask(a_heartbeat(), Pulse)
        hear_slowly(monkeypatch, 0.005)
        group, payload, _ = groups_without_leases()
        for _ in range(100):
            await server.say(group, payload)
        await server.say(a_heartbeat())
        answers = await server.everything_until(Pulse)
        assert sum(isinstance(answer, GroupRefused) for answer in answers) < 50


async def test_groups_are_not_heard_while_leases_are_being_sent_and_heartbeats_are(tmp_path, monkeypatch):
    are_sent = asyncio.Event()
    patient = settings_in(tmp_path, rules=some_settings(max_offences=1000))
    async with a_coordinator_serving(patient) as (_, address), a_server(address) as server:
        await server.expect(Lease)
        await server.ask(a_heartbeat(), Pulse)
        hear_slowly(monkeypatch, 2 * TURN_S)
        monkeypatch.setattr(Lender, "wait_until_sent", lambda lender: are_sent.wait())
        group, payload, _ = groups_without_leases()
        for _ in range(10):
            await server.say(group, payload)
        heard = []
        for _ in range(20):
            await server.say(a_heartbeat())
            heard += await server.everything_until(Pulse)
        assert sum(isinstance(each, GroupRefused) for each in heard) == 1
        are_sent.set()
        for _ in range(9):
            await server.expect(GroupRefused)


async def test_a_server_with_another_model_is_refused(tmp_path):
    serving = a_coordinator_serving(settings_in(tmp_path))
    async with serving as (_, address), a_server(address, join=False) as server:
        await server.ask(a_hello(), Welcome)
        refused = await server.ask(a_ready(model_fingerprint="other"), Refused)
        assert "the server's model has fingerprint other" in refused.reason


async def test_garbage_is_counted_and_other_servers_are_served_meanwhile(tmp_path):
    settings = settings_in(tmp_path, rules=some_settings(max_offences=3))
    serving = a_coordinator_serving(settings)
    async with serving as (learner, address), a_server(address) as server, open_dealer(address) as attacker:
        for _ in range(5):
            await attacker.send([b"\xc1 nonsense", b""])
        await attacker.send([b"\x90", b"", b""])
        await finish(server, await server.expect(Lease))
        await server.expect(GroupsAccepted)
        while (refused := (await learner.expect(CoordinatorStatus)).refused) != {"garbage": 3, "malformed": 1}:
            assert refused.get("garbage", 0) <= 3


async def test_a_server_that_reconnects_is_asked_for_hello_and_gets_its_leases_again(tmp_path):
    async with a_coordinator_serving(settings_in(tmp_path)) as (learner, address):
        async with a_server(address) as server:
            before = [await server.expect(Lease) for _ in range(4)]
        async with a_server(address, join=False) as server:
            assert (await server.ask(a_heartbeat(), Refused)).retry
            await server.ask(a_hello(), Welcome)
            await server.say(a_ready())
            assert [await server.expect(Lease) for _ in range(4)] == before
        assert (await learner.expect(CoordinatorStatus)).leased == 4


async def test_a_resumed_run_leases_what_was_not_trained_under_another_session(tmp_path):
    settings = settings_in(tmp_path)
    async with a_coordinator_serving(settings) as (learner, address), a_server(address) as server:
        leases = [await server.expect(Lease) for _ in range(4)]
        first = await server.ask(a_hello(), Welcome)
        for lease in leases[:2]:
            await finish(server, lease)
            await server.expect(GroupsAccepted)
        await learner.say(TakeBatch(version=0))
        await learner.expect(Batch)
        await learner.say(StepCompleted(version=1, lease_ids=(0, 1)))
        frontier = await learner.ask(TakeFrontier(), Frontier)
        assert frontier.version == 1
    run = an_open_run(version=1, frontier=frontier.frontier)
    async with a_coordinator_serving(settings, run) as (learner, address), a_server(address) as server:
        again = [await server.expect(Lease) for _ in range(4)]
        assert [lease.task_id for lease in again] == [2, 3, 4, 5]
        assert [lease.row for lease in again[:2]] == [lease.row for lease in leases[2:]]
        second = await server.ask(a_hello(), Welcome)
        assert second.session != first.session


async def test_a_frontier_of_another_version_is_a_users_error_before_any_work(tmp_path):
    settings = settings_in(tmp_path)
    tasks = open_tasks(settings.prompts, seed=0)
    async with a_learner(settings) as learner:
        await learner.say(an_open_run(version=3, frontier=b"{}"))
        with pytest.raises(UserError, match="the run cannot be resumed: the checkpoint's frontier is damaged"):
            await serve(settings, tasks)


async def test_a_learner_that_contradicts_itself_ends_the_service(tmp_path):
    settings = settings_in(tmp_path)
    tasks = open_tasks(settings.prompts, seed=0)
    async with a_learner(settings) as learner:

        async def ask_for_what_cannot_be():
            await learner.ask(an_open_run(), RunOpened)
            await learner.say(TakeBatch(version=7))

        with pytest.raises(ExceptionGroup) as failure:
            await asyncio.gather(serve(settings, tasks), ask_for_what_cannot_be())
        assert failure.group_contains(LearnerError, match="asks for the batch of version 7, the run is at 0")


async def test_a_run_is_opened_once(tmp_path):
    settings = settings_in(tmp_path)
    async with a_learner(settings) as learner:

        async def open_twice():
            await learner.ask(an_open_run(), RunOpened)
            await learner.say(an_open_run())

        with pytest.raises(ExceptionGroup) as failure:
            await asyncio.gather(serve(settings, open_tasks(settings.prompts, seed=0)), open_twice())
        assert failure.group_contains(LearnerError, match="the learner opened the run twice")


async def test_a_dataset_row_that_cannot_be_used_ends_the_service_with_its_place(tmp_path):
    class BrokenTasks:
        name = "broken"
        are_in_memory = False

        def task(self, task_id):
            raise DataError(f"prompts row {task_id}: the prompt is empty")

    settings = settings_in(tmp_path)
    async with a_learner(settings) as learner:

        async def join():
            opened = await learner.ask(an_open_run(), RunOpened)
            async with a_server(opened.listen_address):
                pass

        with pytest.raises(ExceptionGroup) as failure:
            await asyncio.gather(serve(settings, BrokenTasks()), join())
        assert failure.group_contains(UserError, match="prompts row 0: the prompt is empty")


async def test_with_keys_only_allowed_servers_can_join_and_they_are_known_by_their_key(tmp_path):
    keys = ensure_server_keys(tmp_path / "keys", curve_keypair)
    settings = settings_in(tmp_path, keys=str(tmp_path / "keys"))
    async with a_coordinator_serving(settings) as (_, address):
        key = load_client_key(ensure_client_key(keys, "node-1", curve_keypair))
        async with a_server(address, key=key) as server:
            assert (await server.expect(Lease)).lease_id == 0
        async with open_dealer(address) as stranger:
            await stranger.send(encode(a_hello("stranger")))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(stranger.receive(), 0.5)


async def test_missing_keys_are_a_users_error(tmp_path):
    settings = settings_in(tmp_path, keys=str(tmp_path / "none"))
    with pytest.raises(UserError, match="there is no key file"):
        await serve(settings, open_tasks(settings.prompts, seed=0))


def test_settings_come_back_from_their_file_as_they_were(tmp_path):
    settings = settings_in(tmp_path)
    write_settings(settings, tmp_path / "settings.json")
    assert read_settings(tmp_path / "settings.json") == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grup_size": 3}, "unknown field `grup_size`"),
        ({"group_size": 0}, "`int` >= 1"),
        ({"rules": {}}, "groups_per_step"),
    ],
)
def test_settings_that_cannot_be_used_are_a_users_error_that_names_the_file(tmp_path, change, message):
    path = tmp_path / "settings.json"
    write_settings(settings_in(tmp_path), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as error:
        read_settings(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
