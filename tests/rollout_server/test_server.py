"""RolloutServer over real sockets with the table engine, against a learner that says what the test tells it to."""

import asyncio
from contextlib import AsyncExitStack

import msgspec
import pytest

from common.lifecycle import UserError
from common.messages import (
    AdapterNeeds,
    Finished,
    GroupRefused,
    GroupsAccepted,
    GroupsFinished,
    Heartbeat,
    Hello,
    LeaseCancelled,
    LeaseFailed,
    Leaving,
    Message,
    Pulse,
    Ready,
    Refused,
)
from common.snapshot import SnapshotError
from common.wire import open_dealer
from rollout_server import greeting
from rollout_server import server as server_module
from rollout_server.config import RolloutServerConfig
from rollout_server.environments.environment import EnvironmentFailure
from rollout_server.greeting import RunFinishedError, join
from rollout_server.inference import LocalSnapshot, WeightUpdate
from rollout_server.reached_addresses import own_address_towards, with_host_of
from rollout_server.table_engine import TableEngine
from tests.rollout_server.builders_server import HELLO, READY, FakeLearner, a_joined_server, a_learner, a_lease
from tests.rollout_server.test_episodes import ScriptedEnvironment


@pytest.fixture(autouse=True)
def frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEARTBEAT_INTERVAL_S", 0.05)


async def test_a_lease_becomes_a_group_sampled_by_the_published_version_until_the_run_is_finished(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path) as serving:
        for version in (0, 1, 5):
            learner.published = version
            learner.say(Pulse(published_version=version))
            learner.lease(version, min_version=version)
            group = await learner.hear_group()
            assert (group.lease_id, group.task_id, len(group.trajectories)) == (version, 100 + version, 2)
            for trajectory in group.trajectories:
                assert set(trajectory.token_versions[trajectory.loss_mask].tolist()) == {version}
            learner.say(GroupsAccepted(lease_ids=(version,)))
        heartbeat = await learner.hear_heartbeat(loaded_version=5, running_groups=0)
        assert heartbeat.generated_tokens > 0
        learner.say(Finished(reason="enough"))
        await serving
        assert Leaving not in map(type, learner.heard)


async def test_leases_that_come_together_become_one_group_each(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        learner.lease_all(*map(a_lease, (1, 2, 3, 2)))  # one of them twice
        groups = [await learner.hear_group() for _ in range(3)]
        assert {(group.lease_id, group.task_id) for group in groups} == {(1, 101), (2, 102), (3, 103)}
        learner.say(GroupsAccepted(lease_ids=(1, 2, 3)))
        await assert_silence(learner, GroupsFinished)


async def test_a_heartbeat_says_what_the_server_is_doing_and_what_it_waits_for(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, step_s=0.05):
        await learner.hear_heartbeat(doing="waiting for leases at version 0")
        learner.say(Pulse(published_version=0, waiting_for="the queue is full"))
        await learner.hear_heartbeat(doing="the queue is full")
        learner.lease()
        await learner.hear_heartbeat(doing="generating", running_groups=1)


async def test_a_group_is_sent_again_until_it_is_acknowledged_and_never_sampled_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "RESEND_AFTER_S", 0.1)
    environment = ScriptedEnvironment()
    async with a_learner() as learner, a_joined_server(learner, tmp_path, environment):
        learner.lease(3)
        first = await learner.hear_group()
        learner.lease(3)  # as if it had been told twice
        again = await learner.hear_group()
        assert [t.token_ids.tolist() for t in again.trajectories] == [t.token_ids.tolist() for t in first.trajectories]
        learner.say(GroupsAccepted(lease_ids=(3,)))
        await assert_silence(learner, GroupsFinished)
        assert len(environment.texts) == 2  # one for each sample of the one group


@pytest.mark.parametrize("answer", [GroupsAccepted(lease_ids=(3,)), GroupRefused(lease_id=3, reason="too stale")])
async def test_an_answer_of_either_kind_ends_the_sending(tmp_path, monkeypatch, answer):
    monkeypatch.setattr(server_module, "RESEND_AFTER_S", 0.1)
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        learner.lease(3)
        await learner.hear_group()
        learner.say(answer)
        await assert_silence(learner, GroupsFinished)


async def assert_silence(learner: FakeLearner, kind: type[Message]) -> None:
    """Once what was under way has come, nothing of this kind comes any more."""
    for _ in range(2):
        await learner.hear(Heartbeat)
    learner.heard.clear()
    for _ in range(6):
        await learner.hear(Heartbeat)
    assert kind not in map(type, learner.heard)


async def test_a_task_without_a_reward_fails_with_its_reason_and_the_next_one_is_worked_on(tmp_path):
    environment = ScriptedEnvironment(EnvironmentFailure("bad_reward", "a reward must be finite, got nan"))
    async with a_learner() as learner, a_joined_server(learner, tmp_path, environment):
        learner.lease(3)
        failed = await learner.hear(LeaseFailed)
        assert failed == LeaseFailed(lease_id=3, kind="bad_reward", reason="a reward must be finite, got nan")
        learner.lease(4, environment="python:other:one")
        assert (await learner.hear(LeaseFailed)).kind == "wrong_environment"
        await learner.hear_heartbeat(running_groups=0)


async def test_a_cancelled_lease_is_stopped_in_the_middle(tmp_path):
    environment = ScriptedEnvironment()
    async with a_learner() as learner, a_joined_server(learner, tmp_path, environment, step_s=0.2):
        learner.lease(3)
        await learner.hear_heartbeat(running_groups=1)
        learner.say(LeaseCancelled(lease_id=3, reason="too stale"))
        await learner.hear_heartbeat(running_groups=0)
        await assert_silence(learner, GroupsFinished)
        assert environment.num_open == 0


async def test_a_lease_waits_for_the_version_it_asks_for(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        learner.lease(3, min_version=2)
        await assert_silence(learner, GroupsFinished)
        learner.published = 2
        learner.say(Pulse(published_version=2))
        group = await learner.hear_group()
        assert all(set(t.token_versions[t.loss_mask].tolist()) == {2} for t in group.trajectories)


async def test_when_the_learner_comes_back_the_server_begins_anew_and_what_was_leased_before_is_void(tmp_path, caplog):
    environment = ScriptedEnvironment()
    async with AsyncExitStack() as stack:
        former_life = AsyncExitStack()
        former = await former_life.enter_async_context(a_learner(session="1"))
        former.published = 9
        serving = await stack.enter_async_context(a_joined_server(former, tmp_path, environment, step_s=0.1))
        former.lease(3)
        await former.hear_heartbeat(running_groups=1, loaded_version=9)
        await former_life.aclose()
        async with a_learner(former.address, session="2") as learner:
            learner.published = 4  # what its last checkpoint has
            assert (await learner.hear(Heartbeat)).running_groups >= 0
            learner.say(Refused(reason="say Hello", retry=True))
            await learner.hear_hello()
            learner.say(learner.welcome())
            assert await learner.hear(Ready) == READY
            await learner.hear_heartbeat(running_groups=0, loaded_version=4)
            learner.lease(3, seed=12)  # numbers of leases begin anew, too
            group = await learner.hear_group()
            assert all(set(t.token_versions[t.loss_mask].tolist()) == {4} for t in group.trajectories)
            assert environment.num_open == 0
            learner.say(Finished(reason="enough"))
            await serving


async def test_a_welcome_told_twice_changes_nothing(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, step_s=0.1):
        learner.lease(3)
        await learner.hear_heartbeat(running_groups=1)
        learner.say(learner.welcome())
        assert (await learner.hear_group()).lease_id == 3
        assert sum(isinstance(message, Ready) for message in learner.heard) == 1


async def test_a_server_that_must_introduce_itself_again_says_again_that_it_is_ready_and_goes_on(tmp_path):
    """Its connection was cut, with Ready in it perhaps: without another Ready it would never be given a lease."""
    async with a_learner() as learner, a_joined_server(learner, tmp_path, step_s=0.1):
        learner.lease(3)
        await learner.hear_heartbeat(running_groups=1)
        learner.say(Refused(reason="say Hello", retry=True))
        await learner.hear_hello()
        learner.say(learner.welcome())
        ready = await learner.hear(Ready)
        assert msgspec.structs.replace(ready, held=()) == READY
        assert [(held.lease_id, held.proof) for held in ready.held] == [(3, b"proof 3")]
        assert (await learner.hear_group()).lease_id == 3


async def test_when_only_the_coordinator_is_another_one_the_server_goes_on_and_sends_again_at_once(tmp_path):
    environment = ScriptedEnvironment()
    async with a_learner() as learner, a_joined_server(learner, tmp_path, environment):
        learner.lease(3)
        first = await learner.hear_group()
        learner.say(learner.welcome(session="2", run_id=learner.run_id))
        learner.heard.clear()
        assert [held.lease_id for held in (await learner.hear(Ready)).held] == [3]
        again = await learner.hear_group()
        kinds = [type(message) for message in learner.heard]
        assert kinds.index(Heartbeat) < kinds.index(GroupsFinished)
        assert [t.token_ids.tolist() for t in again.trajectories] == [t.token_ids.tolist() for t in first.trajectories]
        learner.say(LeaseCancelled(lease_id=3, reason="it was given up meanwhile"))
        await assert_silence(learner, GroupsFinished)
        assert len(environment.texts) == 2


async def test_a_group_follows_the_word_that_the_version_it_was_sampled_by_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_INTERVAL_S", 60.0)
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        learner.lease(3)
        assert (await learner.hear_group()).lease_id == 3  # so version 0 has been pulled
        learner.lease(4, min_version=2)
        learner.published = 2
        learner.say(Pulse(published_version=2))
        await learner.hear_heartbeat(loaded_version=2)
        assert (await learner.hear_group()).lease_id == 4


async def test_a_coordinator_that_may_have_forgotten_is_told_again_what_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "HEARTBEAT_INTERVAL_S", 60.0)
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        learner.lease(3)
        await learner.hear_group()
        learner.say(Refused(reason="say Hello", retry=True))
        await learner.hear(Hello)
        learner.heard.clear()
        learner.lease(4)  # before it is welcome
        await learner.hear_group()
        kinds = [type(message) for message in learner.heard]
        assert kinds.index(Heartbeat) < kinds.index(GroupsFinished)
        learner.say(learner.welcome())
        await learner.hear(Ready)
        learner.heard.clear()
        learner.lease(5)
        await learner.hear_group()
        kinds = [type(message) for message in learner.heard]
        assert kinds.index(Heartbeat) < kinds.index(GroupsFinished)


@pytest.mark.parametrize("changes", [{"model_fingerprint": "other"}, {"tokenizer_fingerprint": "other"}])
async def test_a_learner_that_comes_back_with_another_model_is_not_served(tmp_path, changes):
    async with a_learner() as learner, a_joined_server(learner, tmp_path) as serving:
        learner.say(learner.welcome(session="2", run_id="run.2", **changes))
        with pytest.raises(ExceptionGroup) as failure:
            await serving
        assert failure.group_contains(UserError, match="came back with another model or tokenizer")


ADAPTERS = AdapterNeeds(rank=8, target_modules=("q_proj", "v_proj"), versions=4)


@pytest.mark.parametrize(
    ("had", "needs", "is_served"),
    [
        (ADAPTERS, ADAPTERS, True),
        (ADAPTERS, AdapterNeeds(rank=4, target_modules=("v_proj",), versions=9), True),
        (ADAPTERS, None, True),
        (ADAPTERS, AdapterNeeds(rank=16, target_modules=("q_proj",), versions=4), False),
        (ADAPTERS, AdapterNeeds(rank=8, target_modules=("o_proj",), versions=4), False),
        (None, ADAPTERS, False),
    ],
)
async def test_a_learner_that_comes_back_with_adapters_that_the_engine_has_no_room_for_is_not_served(
    tmp_path, had, needs, is_served
):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, adapters=had) as serving:
        learner.session = "2"
        learner.say(learner.welcome(adapters=needs))
        if is_served:
            learner.lease(3)
            assert (await learner.hear_group()).lease_id == 3
            return
        with pytest.raises(ExceptionGroup) as failure:
            await serving
        said = f"came back with adapters of {needs}, this engine was started for {had or 'none'}: start a new rollout"
        assert failure.group_contains(UserError, match=said)


class RefusingEngine(TableEngine):
    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        raise SnapshotError(f"snapshot {snapshot.manifest.version} is an adapter of rank 8")


async def test_a_version_that_the_engine_refuses_ends_the_server_with_a_sentence_that_says_what_to_do(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, engine_type=RefusingEngine) as serving:
        with pytest.raises(ExceptionGroup) as failure:
            await serving
        why = "the engine refuses what the learner publishes: snapshot 0 is an adapter of rank 8"
        assert failure.group_contains(UserError, match=f"{why}; start a new rollout server")
        assert (await learner.hear(Leaving)).reason == why


async def test_a_refusal_for_good_ends_the_server_with_its_reason(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path) as serving:
        learner.say(Refused(reason="it sent garbage"))
        with pytest.raises(ExceptionGroup) as failure:
            await serving
        assert failure.group_contains(UserError, match="the learner refuses this rollout server: it sent garbage")


async def test_a_server_that_is_stopped_says_that_it_leaves(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path) as serving:
        await learner.hear(Heartbeat)
        serving.cancel()
        await learner.hear(Leaving)


async def test_what_is_no_message_is_ignored(tmp_path, caplog):
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        learner._router.send(learner._peer, [b"\xc1 garbage", b""])
        learner.lease(3)
        assert (await learner.hear_group()).lease_id == 3
    assert "the learner sent what is not a message" in caplog.text


async def test_a_server_without_a_learner_says_what_it_waits_for_and_joins_when_it_appears(
    monkeypatch, caplog, unused_tcp_port
):
    monkeypatch.setattr(greeting, "SAY_IT_EVERY_S", 0.2)
    monkeypatch.setattr(greeting, "HELLO_INTERVAL_S", 0.1)
    caplog.set_level("INFO")
    address = f"tcp://127.0.0.1:{unused_tcp_port}"
    async with open_dealer(address) as dealer, asyncio.TaskGroup() as tasks:
        joining = tasks.create_task(join(dealer, HELLO))
        while f"waiting for the learner at {address}: is it running, and is the key" not in caplog.text:
            await asyncio.sleep(0.05)
        async with a_learner(address) as learner:
            await learner.hear(Hello)
            learner.say(Refused(reason="not yet", retry=True))
            await learner.hear(Hello)
            learner.say(learner.welcome())
            assert (await joining).run_id == learner.run_id


async def test_a_refusal_for_good_ends_the_joining_with_its_reason():
    async with a_learner() as learner, open_dealer(learner.address) as dealer, asyncio.TaskGroup() as tasks:
        joining = tasks.create_task(refused(dealer))
        await learner.hear(Hello)
        learner.say(Refused(reason="install the same version"))
        await joining


async def refused(dealer) -> None:
    with pytest.raises(UserError, match="the learner refuses this rollout server: install the same version"):
        await join(dealer, HELLO)


async def test_a_server_that_comes_when_the_run_is_over_is_told_so():
    async with a_learner() as learner, open_dealer(learner.address) as dealer, asyncio.TaskGroup() as tasks:
        joining = tasks.create_task(too_late(dealer))
        await learner.hear(Hello)
        learner.say(Finished(reason="60 steps are trained"))
        await joining


async def too_late(dealer) -> None:
    with pytest.raises(RunFinishedError, match="the run is finished: 60 steps are trained"):
        await join(dealer, HELLO)


async def test_a_learner_that_falls_silent_is_missed_by_name(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(server_module, "SAY_IT_EVERY_S", 0.3)
    caplog.set_level("INFO")
    async with a_learner() as learner, a_joined_server(learner, tmp_path):
        while f"waiting for the learner at {learner.address}: nothing heard of it" not in caplog.text:
            await learner.hear(Heartbeat)


@pytest.mark.parametrize(
    ("bound", "reached"),
    [
        ("tcp://0.0.0.0:7", "tcp://learner-host:7"),
        ("tcp://[::]:7", "tcp://learner-host:7"),
        ("tcp://10.0.0.2:7", "tcp://10.0.0.2:7"),
        ("ipc:///run/weights", "ipc:///run/weights"),
    ],
)
def test_weights_bound_on_all_networks_are_reached_at_the_learners_host(bound, reached):
    assert with_host_of("tcp://learner-host:5557", bound) == reached


def test_a_relay_listens_on_the_network_that_reaches_the_learner_and_is_reached_there_if_it_listens_on_all():
    assert own_address_towards("tcp://127.0.0.1:5557") == "tcp://127.0.0.1:0"
    assert own_address_towards("ipc:///tmp/learner") == "tcp://127.0.0.1:0"
    assert with_host_of(own_address_towards("tcp://127.0.0.1:5557"), "tcp://0.0.0.0:6000") == "tcp://127.0.0.1:6000"
    with pytest.raises(
        ValueError, match=r"relay_listen must look like tcp://HOST:PORT, or be empty; got '10\.0\.0\.1:5'"
    ):
        RolloutServerConfig(learner="tcp://10.0.0.2:5557", relay_listen="10.0.0.1:5")
