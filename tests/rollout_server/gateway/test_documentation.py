"""The agents of docs/environments.md do what it says, and are printed there as they are."""

import asyncio
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from common.environments import EnvironmentSettings
from rollout_server.environments import ENVIRONMENTS, environment_at
from rollout_server.gateway.gateway import Gateway
from tests.rollout_server.gateway.builders_gateway import a_gateway, episode_of, sampled_text
from tests.rollout_server.gateway.served import served

DOCS = Path(__file__).resolve().parents[3] / "docs"
CALL = '<tool_call>\n{"name": "product", "arguments": {"numbers": [6, 7]}}\n</tool_call>'
ROW = b'{"prompt": "6 * 7?", "answer": "42"}'


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["agent_server", "agent_pull"])
def test_the_examples_are_printed_as_they_are(name):
    assert (DOCS / f"{name}.py").read_text() in (DOCS / "environments.md").read_text()


def test_every_kind_of_environment_is_described():
    text = (DOCS / "environments.md").read_text()
    missing = [scheme for scheme in ENVIRONMENTS if f"{scheme}:" not in text and f"{scheme[:-1]}:" not in text]
    assert missing == []


async def test_the_agent_server_plays_with_its_tool_through_the_gateway():
    async with (
        served(example("agent_server").app) as address,
        a_gateway() as gateway,
        environment_at(f"agent+{address}/run", EnvironmentSettings(episode_timeout_s=60)) as environment,
    ):
        trajectories = await episode_of(environment, gateway, CALL, "It is 42.", lease={"row": ROW})
    assert [sampled_text(one) for one in trajectories] == [f"{CALL}<|im_end|>It is 42.<|im_end|>"]
    assert (trajectories[0].reward, trajectories[0].turns) == (1.0, 2)


async def test_the_agent_that_asks_for_tasks_is_given_them_and_ends_them():
    work = example("agent_pull").work

    async def agent(gateway: Gateway) -> bool:
        return await asyncio.to_thread(work, gateway.address)

    async with (
        a_gateway() as gateway,
        environment_at("agent:pull", EnvironmentSettings(episode_timeout_s=60)) as environment,
        asyncio.TaskGroup() as tasks,
    ):
        episode = tasks.create_task(episode_of(environment, gateway, "42", lease={"row": ROW}))
        worked = tasks.create_task(agent(gateway))
    [trajectory] = episode.result()
    assert (trajectory.reward, worked.result()) == (1.0, True)
