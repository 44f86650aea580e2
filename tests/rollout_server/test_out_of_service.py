"""A rollout server whose engine computes with other weights than it was given, and what the learner hears of it."""

import asyncio

import numpy as np
import pytest

from common.lifecycle import UserError
from common.messages import GroupsFinished, Heartbeat, Leaving, Pulse
from rollout_server import server as server_module
from rollout_server.inference import LocalSnapshot, WeightUpdate
from rollout_server.table_engine import TableEngine
from tests.rollout_server.builders_server import FakeLearner, a_joined_server, a_learner


@pytest.fixture(autouse=True)
def frequent_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HEARTBEAT_INTERVAL_S", 0.05)


class StaleEngine(TableEngine):
    """Keeps its table when it is given version 1, once; the load that repairs it waits for `may_repair`."""

    times = 1
    may_repair: asyncio.Event

    async def load_weights(self, snapshot: LocalSnapshot) -> WeightUpdate:
        before_VV: np.ndarray = self._table_VV
        if snapshot.manifest.version == 1 and self.loaded_version == 1:
            await self.may_repair.wait()
        update = await super().load_weights(snapshot)
        if snapshot.manifest.version == 1 and self.times > 0:
            self.times -= 1
            self._table_VV = before_VV
        return update


class NeverRightEngine(StaleEngine):
    times = 2


@pytest.fixture
def may_repair(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    event = asyncio.Event()
    monkeypatch.setattr(StaleEngine, "may_repair", event, raising=False)
    return event


def publish(learner: FakeLearner, version: int) -> None:
    learner.published = version
    learner.say(Pulse(published_version=version))


async def hear_out_of_service(learner: FakeLearner) -> Heartbeat:
    while not (heartbeat := await learner.hear(Heartbeat)).out_of_service:
        pass
    return heartbeat


async def test_it_says_so_and_drops_its_work_and_goes_on_with_version_1_once_that_was_loaded_whole(
    tmp_path, may_repair, caplog
):
    async with (
        a_learner() as learner,
        a_joined_server(learner, tmp_path, step_s=0.05, engine_type=StaleEngine),
    ):
        learner.lease(3)
        await learner.hear_heartbeat(running_groups=1, loaded_version=0)
        publish(learner, 1)
        heartbeat = await hear_out_of_service(learner)
        assert heartbeat.out_of_service.startswith(
            "with version 1 loaded, the engine's log-probabilities of the canary"
        )
        assert (heartbeat.loaded_version, heartbeat.running_groups) == (0, 0)
        assert heartbeat.doing == "repairing the weights"
        learner.lease(4)  # as a coordinator that has not heard it yet
        assert (await hear_out_of_service(learner)).running_groups == 0
        may_repair.set()
        await learner.hear_heartbeat(loaded_version=1, out_of_service="")
        learner.lease(5, min_version=1)
        group = await learner.hear_group()
        assert group.lease_id == 5
        assert all(set(t.token_versions[t.loss_mask].tolist()) == {1} for t in group.trajectories)
    finished = [message.groups for message in learner.heard if isinstance(message, GroupsFinished)]
    assert [group.lease_id for groups in finished for group in groups] == [5]


async def test_a_group_that_wrong_weights_have_helped_to_sample_is_not_sent(tmp_path, may_repair):
    """Not even when it was finished before the canary had an answer: it was held back until then."""
    async with (
        a_learner() as learner,
        a_joined_server(learner, tmp_path, engine_type=StaleEngine),
    ):
        await learner.hear_heartbeat(loaded_version=0)
        answer = TableEngine.token_logprobs
        asked = asyncio.Event()

        async def slow_answer(self: TableEngine, token_ids: np.ndarray) -> np.ndarray:
            asked.set()
            await asyncio.sleep(0.3)
            return await answer(self, token_ids)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StaleEngine, "token_logprobs", slow_answer)
            publish(learner, 1)
            await asked.wait()
            learner.lease(3)
            await hear_out_of_service(learner)
        may_repair.set()
        await learner.hear_heartbeat(loaded_version=1, out_of_service="")
    assert GroupsFinished not in map(type, learner.heard)


async def test_one_that_is_still_wrong_then_ends_and_tells_the_learner_why(tmp_path, may_repair):
    may_repair.set()
    async with (
        a_learner() as learner,
        a_joined_server(learner, tmp_path, engine_type=NeverRightEngine) as serving,
    ):
        await learner.hear_heartbeat(loaded_version=0)
        publish(learner, 1)
        leaving = await learner.hear(Leaving)
        with pytest.raises(ExceptionGroup) as failed:
            await serving
    assert leaving.reason.startswith("with version 1 loaded, the engine's log-probabilities of the canary")
    assert failed.group_contains(UserError, match="so they were before the whole snapshot was loaded", depth=1)
