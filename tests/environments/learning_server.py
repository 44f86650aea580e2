"""reasoning-gym's greatest common divisors of two digits behind OpenEnv. Runs where the library is installed.

--scores FILE: the true score of every answer, one a line. --random-reward: rewards that have nothing to do with it.
"""

import argparse
import random

import reasoning_gym
import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("--scores", required=True)
arguments.add_argument("--random-reward", action="store_true")
options = arguments.parse_args()
scores = open(options.scores, "a", buffering=1)  # noqa: SIM115 - as long as the process
rewards = random.Random(0)


class Answer(Action):
    answer: str


class Shown(Observation):
    text: str = ""


class Divisors(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: object) -> Shown:
        self.data = reasoning_gym.create_dataset("gcd", size=1, seed=seed or 0, min_value=1, max_value=9)
        return Shown(text=self.data[0]["question"])

    def step(self, action: Answer, timeout_s: float | None = None, **kwargs: object) -> Shown:
        score = float(self.data.score_answer(action.answer, self.data[0]) == 1.0)
        scores.write(f"{score}\n")
        return Shown(reward=float(rewards.random() < 0.3) if options.random_reward else score, done=True)

    @property
    def state(self) -> State:
        return State()


app = create_app(Divisors, Answer, Shown, env_name="divisors", max_concurrent_envs=512)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
