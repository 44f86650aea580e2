"""What every kind of environment must hold. A new kind adds one line to KINDS: a URL that does what it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest
import pytest_asyncio

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import Environment, EnvironmentFailure, Said, parse_row
from tests.rollout_server.http_twin import an_http_server, obeys
from tests.rollout_server.nemo_gym_twin import a_nemo_gym_server
from tests.rollout_server.openenv_twin import an_openenv_server

PYTHON_KINDS = {
    "python function": "python:tests.rollout_server.reward_functions:obeys",
    "python async function": "python:tests.rollout_server.reward_functions:obeys_async",
}


@asynccontextmanager
async def at_python(url: str) -> AsyncIterator[str]:
    yield url


@asynccontextmanager
async def behind_http() -> AsyncIterator[str]:
    async with an_http_server(obeys) as server:
        yield f"reward+http://127.0.0.1:{server.port}/get_reward"


@asynccontextmanager
async def behind_openenv() -> AsyncIterator[str]:
    async with an_openenv_server() as server:
        yield server.url


@asynccontextmanager
async def behind_nemo_gym(style: str) -> AsyncIterator[str]:
    async with a_nemo_gym_server(style=style) as server:
        yield server.url


KINDS = {name: partial(at_python, url) for name, url in PYTHON_KINDS.items()} | {
    "reward model": behind_http,
    "OpenEnv": behind_openenv,
    "NeMo Gym with verify": partial(behind_nemo_gym, "verify"),
    "NeMo Gym with step": partial(behind_nemo_gym, "step"),
}

ROW = parse_row(b'{"prompt": "do"}')
TIMEOUT_S = 1.5


# One environment of each kind serves all tests: whatever one does to it, the next finds it well.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS.values(), ids=KINDS.keys())
async def environment(request: pytest.FixtureRequest) -> AsyncIterator[Environment]:
    settings = EnvironmentSettings(step_timeout_s=TIMEOUT_S, max_concurrent=8)
    async with request.param() as url, environment_at(url, settings) as environment:
        yield environment


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PYTHON_KINDS.values(), ids=PYTHON_KINDS.keys())
async def python(request: pytest.FixtureRequest) -> AsyncIterator[Environment]:
    async with environment_at(request.param, EnvironmentSettings(step_timeout_s=TIMEOUT_S)) as environment:
        yield environment


async def reward_for(environment: Environment, completion: str) -> float:
    async with environment.episode(ROW, seed=0) as episode:
        await episode.reset()
        return (await episode.step(said(completion))).reward


def said(text: str) -> Said:
    return Said(text=text, read_all=lambda: text)


async def failure_for(environment: Environment, completion: str) -> EnvironmentFailure:
    with pytest.raises(EnvironmentFailure) as caught:
        await reward_for(environment, completion)
    return caught.value


async def test_an_episode_starts_with_the_prompt_and_ends_with_a_reward(environment):
    async with environment.episode(ROW, seed=0) as episode:
        assert (await episode.reset()) in ("do", "dodo")  # of the row, and of an environment with words of its own
        step = await episode.step(said("reward 0.25"))
    assert (step.reward, step.done, step.truncated) == (0.25, True, False)


@pytest.mark.parametrize("number", ["reward -1.5", "int 3", "numpy 0.5", "fraction 1/4", "reward 1e9"])
async def test_any_plausible_number_is_a_reward(environment, number):
    expected = {"fraction 1/4": 0.25}.get(number) or float(number.split()[1])
    assert await reward_for(environment, number) == expected


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("nan", "finite, got nan"),
        ("infinity", "finite, got inf"),
        ("none", "NoneType"),
        ("text 1.0", "got str '1.0'"),
        ("boolean", "got bool True"),
        ("numpy_boolean", "got bool"),
        ("huge", "within ±1e+09, got 1e+30"),
        ("huge_int", "too large"),
        ("list", "got list"),
    ],
)
async def test_what_is_not_a_plausible_number_is_a_failure_and_not_a_reward(environment, action, reason):
    failure = await failure_for(environment, action)
    assert failure.kind == "bad_reward"
    assert reason in failure.reason


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("raise apples", "KeyError: 'apples' (at reward_functions.py:"),
        ("raise_unprintable", "Unprintable: (its message cannot be shown)"),
        ("raise_surrogate", "KeyError"),
        ("raise_cancelled", "CancelledError"),
        ("leave 3", "SystemExit: 3"),
        ("die 3", "exit code 3"),
        ("crash", "SIGSEGV"),
        ("garble", "broke the protocol"),
    ],
)
async def test_what_raises_or_dies_is_a_failure_with_the_reason_and_the_next_episode_is_well(python, action, reason):
    failure = await failure_for(python, action)
    assert failure.kind == "environment_error"
    assert reason in failure.reason
    assert await reward_for(python, "reward 1") == 1.0


async def test_a_reason_is_bounded_however_long_the_message(python):
    failure = await failure_for(python, "raise " + "x" * 100_000)
    assert len(failure.reason) <= 1000


@pytest.mark.parametrize("action", ["hang", "block"])
async def test_what_hangs_fails_in_time_and_the_next_episode_is_well(environment, action):
    async with asyncio.timeout(TIMEOUT_S + 5):
        failure = await failure_for(environment, action)
    assert failure.kind == "environment_timeout"
    assert f"{TIMEOUT_S} s" in failure.reason
    assert await reward_for(environment, "reward 1") == 1.0


async def test_a_thousand_episodes_at_once_each_get_their_own_reward(environment):
    rewards = await asyncio.gather(*(reward_for(environment, f"reward {index}") for index in range(1000)))
    assert rewards == list(range(1000))


async def test_good_episodes_end_well_among_raising_hanging_and_lying_ones(environment):
    bad = ["list", "nan", "hang", "none"]
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        failures = [tasks.create_task(failure_for(environment, action)) for action in bad]
        rewards = [tasks.create_task(reward_for(environment, f"reward {index}")) for index in range(100)]
    assert [reward.result() for reward in rewards] == list(range(100))
    kinds = ["bad_reward", "bad_reward", "environment_timeout", "bad_reward"]
    assert [failure.result().kind for failure in failures] == kinds


async def test_a_cancelled_step_leaves_the_environment_well(environment):
    async with asyncio.TaskGroup() as tasks:
        hanging = [tasks.create_task(reward_for(environment, "hang")) for _ in range(3)]
        await asyncio.sleep(0.05)  # until they are under way; nothing depends on it
        for step in hanging:
            step.cancel()
    rewards = await asyncio.gather(*(reward_for(environment, f"reward {index}") for index in range(20)))
    assert rewards == list(range(20))


async def test_leaving_while_steps_run_fails_them_with_a_reason():
    for kind in KINDS.values():
        async with (
            asyncio.timeout(20),
            kind() as url,
            asyncio.TaskGroup() as tasks,
            environment_at(url, EnvironmentSettings(step_timeout_s=60)) as environment,
        ):
            steps = [tasks.create_task(failure_for(environment, "hang")) for _ in range(20)]
            await asyncio.sleep(0.05)  # some run, some are queued; the result is the same for both
        assert {step.result().kind for step in steps} == {"environment_error"}
