"""The learner's side, with real coordinator processes that are killed under it."""

import asyncio
import os
import signal
from contextlib import asynccontextmanager

import msgspec
import pytest

from common.messages import Finished, GroupRefused, GroupsAccepted, HeldLease, Lease, Refused, Welcome
from learner.coordinator import client as client_module
from learner.coordinator.client import CoordinatorClient, CoordinatorLostError
from learner.coordinator.leases import LEASE_ID_LEAP
from tests.builders_coordinator import a_heartbeat, a_hello, a_ready, an_open_run
from tests.builders_coordinator_service import a_server, finish, settings_in

TIMEOUT_S = 30


@asynccontextmanager
async def a_client(settings, tmp_path):
    """Yields the client, supervising, and the address of its first coordinator."""
    client = CoordinatorClient(settings, tmp_path)
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        supervising = tasks.create_task(client.supervise())
        address = await client.open_run(an_open_run())
        await client.published(0)
        yield client, address
        supervising.cancel()


async def kill(client):
    """Returns when the next coordinator knows the run."""
    before = client.pid
    os.kill(before, signal.SIGKILL)
    await client.take_frontier()
    assert client.pid != before


async def greet(server):
    while not isinstance(await server.ask(a_heartbeat(), (Refused, Welcome)), Refused):
        pass
    await server.ask(a_hello(), Welcome)
    await server.say(a_ready())
    await server.say(a_heartbeat())


async def test_groups_accepted_before_the_coordinator_was_killed_are_trained_once(tmp_path):
    async with a_client(settings_in(tmp_path), tmp_path) as (client, address), a_server(address) as server:
        leases = [await server.expect(Lease) for _ in range(4)]
        for lease in leases[:2]:
            await finish(server, lease)
            await server.expect(GroupsAccepted)
        await kill(client)
        first = await client.take_batch(0)
        assert [group.task_id for group in first] == [0, 1]
        await kill(client)  # while the learner trains
        await client.step_completed(1, tuple(group.lease_id for group in first))
        await kill(client)  # before it asks again
        await client.published(1)
        await greet(server)
        again = [await server.expect(Lease) for _ in range(2)]
        assert [lease.task_id for lease in again] == [2, 3]
        for lease in again:
            await server.say(a_heartbeat(loaded_version=1))
            await finish(server, lease, version=1)
        second = await client.take_batch(1)
        assert [group.task_id for group in second] == [2, 3]
        await client.close_run("enough")
        await server.expect(Finished)


async def test_what_a_server_holds_when_the_coordinator_is_killed_is_not_lost(tmp_path):
    async with a_client(settings_in(tmp_path), tmp_path) as (client, address), a_server(address) as server:
        leases = [await server.expect(Lease) for _ in range(4)]
        await kill(client)
        while not isinstance(await server.ask(a_heartbeat(), (Refused, Welcome)), Refused):
            pass
        await server.ask(a_hello(), Welcome)
        held = [
            HeldLease(lease_id=one.lease_id, task_id=one.task_id, min_version=one.min_version, proof=one.proof)
            for one in leases[:3]
        ]
        forged = msgspec.structs.replace(held[2], proof=b"forged")
        await server.say(a_ready(held=(*held[:2], forged)))
        await server.say(a_heartbeat())
        for lease in leases[:2]:
            await finish(server, lease)
            assert (await server.expect(GroupsAccepted)).lease_ids == (lease.lease_id,)
        await finish(server, leases[2])
        assert "ended long ago" in (await server.expect(GroupRefused)).reason
        assert [group.task_id for group in await client.take_batch(0)] == [0, 1]
        assert [(await server.expect(Lease)).task_id for _ in range(2)] == [2, 3]


async def test_a_request_that_was_not_answered_is_asked_again(tmp_path):
    async with a_client(settings_in(tmp_path), tmp_path) as (client, address), asyncio.TaskGroup() as tasks:
        batch = tasks.create_task(client.take_batch(0))
        await kill(client)
        async with a_server(address) as server:
            for lease in [await server.expect(Lease) for _ in range(2)]:
                await finish(server, lease)
            assert [group.task_id for group in await batch] == [0, 1]


async def test_what_a_checkpoint_covers_is_not_repeated_after_a_restart_of_the_learner(tmp_path):
    settings = settings_in(tmp_path)
    async with a_client(settings, tmp_path) as (client, address), a_server(address) as server:
        for lease in [await server.expect(Lease) for _ in range(3)]:
            await finish(server, lease)
        batch = await client.take_batch(0)
        await client.step_completed(1, tuple(group.lease_id for group in batch))
        frontier = await client.take_frontier()
        await client.checkpoint_saved(1, frontier)
        await client.take_frontier()
        await kill(client)  # the journal has forgotten the first batch: the next coordinator must be told of the second
    client = CoordinatorClient(settings, tmp_path)
    async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
        supervising = tasks.create_task(client.supervise())
        address = await client.open_run(an_open_run(version=1, frontier=frontier))
        await client.published(1)
        async with a_server(address) as server:
            await server.say(a_heartbeat(loaded_version=1))
            lease = await server.expect(Lease)
            await finish(server, lease, version=1)
            assert sorted(group.task_id for group in await client.take_batch(1)) == [2, 3]
        supervising.cancel()


async def test_a_question_to_a_coordinator_that_was_stopped_is_not_waited_for(tmp_path):
    async with a_client(settings_in(tmp_path), tmp_path) as (client, _):
        pass
    with pytest.raises(CoordinatorLostError, match="the coordinator was stopped"):
        await client.take_frontier()


async def test_a_coordinator_that_ends_by_itself_ends_the_learner_with_its_reason(tmp_path):
    settings = settings_in(tmp_path, prompts=str(tmp_path / "gone.jsonl"))
    client = CoordinatorClient(settings, tmp_path)

    async def start():
        async with asyncio.timeout(TIMEOUT_S), asyncio.TaskGroup() as tasks:
            tasks.create_task(client.supervise())
            await client.open_run(an_open_run())

    with pytest.raises(ExceptionGroup) as failure:
        await start()
    assert failure.group_contains(CoordinatorLostError, match="ended with exit code 2; start the learner to resume")
    with pytest.raises(CoordinatorLostError):
        await client.take_frontier()


async def test_a_step_completed_while_the_next_coordinator_starts_is_told_to_it(tmp_path):
    async with a_client(settings_in(tmp_path), tmp_path) as (client, address), a_server(address) as server:
        for lease in [await server.expect(Lease) for _ in range(2)]:
            await finish(server, lease)
        batch = await client.take_batch(0)
        before = client.pid
        os.kill(before, signal.SIGKILL)
        while client.pid == before:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)  # it has been told where the run is, and has not answered
        await client.step_completed(1, tuple(group.lease_id for group in batch))
        await client.published(1)
        await client.take_frontier()
        await client.checkpoint_saved(1, await client.take_frontier())


async def test_lease_ids_go_on_though_coordinators_are_killed_before_they_have_done_anything(tmp_path):
    async with a_client(settings_in(tmp_path), tmp_path) as (client, address):
        await kill(client)
        await kill(client)
        async with a_server(address) as server:
            assert (await server.expect(Lease)).lease_id >= 2 * LEASE_ID_LEAP


async def test_a_coordinator_that_hangs_is_named_until_it_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(client_module, "SAY_IT_EVERY_S", 0.2)
    caplog.set_level("INFO")
    async with a_client(settings_in(tmp_path), tmp_path) as (client, address), asyncio.TaskGroup() as tasks:
        batch = tasks.create_task(client.take_batch(0))
        while "no rollout server has joined" not in caplog.text:
            await asyncio.sleep(0.05)
        os.kill(client.pid, signal.SIGSTOP)
        while caplog.text.count(f"the coordinator, process {client.pid}: nothing heard of it for") < 2:
            await asyncio.sleep(0.05)
        os.kill(client.pid, signal.SIGCONT)
        async with a_server(address) as server:
            for _ in range(2):
                await finish(server, await server.expect(Lease))
            assert len(await batch) == 2
        await client.close_run("enough")
