"""A game of TextArena for one player behind OpenEnv. Runs where both are installed."""

import argparse
import contextlib
import os

import textarena
import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("--game", default="GuessTheNumber-v0")
options = arguments.parse_args()


class Move(Action):
    message: str


class Heard(Observation):
    prompt: str = ""


class Game(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: object) -> Heard:
        self.game = textarena.make(options.game)
        self.game.reset(num_players=1, seed=seed)
        self.turns = 0
        return Heard(prompt=self.heard())

    def heard(self) -> str:
        """All that was said so far: games repeat it every turn, and the policy has read it."""
        return str(self.game.get_observation()[1])

    def step(self, action: Move, timeout_s: float | None = None, **kwargs: object) -> Heard:
        before = self.heard()
        done, _ = self.game.step(action.message)
        self.turns += 1
        if not done:
            return Heard(prompt=self.heard().removeprefix(before).strip(), reward=0.0)
        rewards, _ = self.game.close()
        return Heard(reward=float(rewards[0]), done=True)

    @property
    def state(self) -> State:
        return State(step_count=self.turns)


app = create_app(Game, Move, Heard, env_name="game", max_concurrent_envs=64)

if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # games print
        uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
