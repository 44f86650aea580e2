"""A thousand episodes, good and bad: no session, call, connection or task is left of them."""

import asyncio
import os

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.lease_failure import LeaseFailure
from tests.rollout_server.gateway.builders_gateway import (
    Gateway,
    GatewaySettings,
    SayingEngine,
    a_client,
    a_runner,
    say,
    user,
)
from tests.rollout_server.http_twin import Dies, Hangs, Request, an_http_server, reply
from tests.rollout_server.test_episodes import a_lease

EPISODES = 1000
AT_ONCE = 50
HANGS = 3


class Says(SayingEngine):
    """Always the same."""

    async def generate(self, prompt_ids, sampling, request_id):
        self.texts = ["5"]
        return await super().generate(prompt_ids, sampling, request_id)


def num_sockets() -> int:
    return sum("socket" in os.readlink(f"/proc/self/fd/{one}") for one in os.listdir("/proc/self/fd") if is_open(one))


def is_open(descriptor: str) -> bool:
    return os.path.islink(f"/proc/self/fd/{descriptor}")


async def behaves(request: Request) -> bytes:
    """As the number of its row says: well in half of the cases."""
    asked = request.json
    number = int(asked["task"]["prompt"])
    if number % 10 == HANGS:
        raise Hangs
    async with a_client(asked["base_url"], asked["api_key"]) as client:
        await say(client, [user("2+3")])
    if number % 10 == 1:
        raise Dies
    return reply('{"reward": 1.0}' if number % 2 == 0 else '{"reward": "1"}')


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_after_a_thousand_episodes_nothing_is_left_of_them():
    engine = Says()
    places = asyncio.Semaphore(AT_ONCE)
    patient = EnvironmentSettings(episode_timeout_s=300.0, tries=1)
    impatient = EnvironmentSettings(episode_timeout_s=1.0, tries=1)
    sockets, tasks_before = num_sockets(), len(asyncio.all_tasks())
    async with (
        an_http_server(behaves) as server,
        Gateway(GatewaySettings()) as gateway,
        environment_at(f"agent+http://127.0.0.1:{server.port}/run", patient) as environment,
        environment_at(f"agent+http://127.0.0.1:{server.port}/run", impatient) as hanging,
    ):
        runners = [a_runner(engine, each, gateway) for each in (environment, hanging)]

        async def episode(number: int) -> str:
            lease = a_lease(prompt=str(number), environment=environment.url, group_size=1)
            async with places:
                try:
                    [trajectory] = (await runners[number % 10 == HANGS].run(lease)).trajectories
                except LeaseFailure as failure:
                    return failure.kind
                return str(trajectory.reward)

        outcomes = await asyncio.gather(*(episode(number) for number in range(EPISODES)))
        assert {outcome: outcomes.count(outcome) for outcome in set(outcomes)} == {
            "1.0": 500,
            "environment_error": 100,
            "environment_timeout": 100,
            "bad_reward": 300,
        }
        assert "0 sessions" in repr(gateway)
        assert engine.num_running == runners[0].num_running == runners[1].num_running == 0
        assert all(f"0/{patient.max_concurrent}" in repr(each._replicas) for each in (environment, hanging))
    assert (num_sockets(), len(asyncio.all_tasks())) == (sockets, tasks_before)
