"""An environment server goes away and comes back in the middle of a run: real coordinator, rollout server, sockets."""

from pathlib import Path

import pytest

from common.environments import Environments
from tests.rollout_server.openenv_twin import OpenEnvTwin
from tests.system.environment_run import PATIENCE_S, a_run

SUMS, GAMES = 0, 1


def always_right(text: str, schema: object) -> dict[str, str]:
    return {"text": "reward 1"}


def environments_with(games: OpenEnvTwin) -> Environments:
    return Environments.from_toml(
        {
            "sums": {"url": "python:tests.rollout_server.reward_functions:num_characters"},
            "games": {"url": games.url, "parse_action": f"{__name__}:always_right"},
        }
    )


async def test_an_environment_that_goes_down_pauses_its_own_tasks_alone_and_comes_back_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tests.rollout_server.builders_server.PATIENCE_S", PATIENCE_S)
    games = OpenEnvTwin()
    await games.start()
    async with a_run(environments_with(games), tmp_path) as run:
        for _ in range(5):
            await run.step()
        assert min(run.trained[SUMS], run.trained[GAMES]) >= 5

        await games.stop()
        for _ in range(5):  # what was under way still comes
            await run.step()
        run.trained.clear()
        for _ in range(5):
            await run.step()
        assert run.trained == {SUMS: 20}

        await games.start(games.port)
        run.trained.clear()
        while run.trained[GAMES] < 20:
            await run.step()
    await games.stop()
