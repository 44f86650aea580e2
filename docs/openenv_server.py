"""A complete OpenEnv server: any reasoning-gym task, with a hint after each wrong answer.

pip install openenv reasoning-gym
python openenv_server.py --port 8000 --task chain_sum
"""

import argparse

import reasoning_gym
import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, default=8000)
arguments.add_argument("--task", default="chain_sum")
arguments.add_argument("--tries", type=int, default=2)
arguments.add_argument("--sessions", type=int, default=256)
options = arguments.parse_args()


class Answer(Action):
    answer: str  # the one required field: what the policy says becomes its value


class Shown(Observation):
    text: str


class Puzzle(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: object) -> Shown:
        self.data = reasoning_gym.create_dataset(options.task, size=1, seed=seed or 0)
        self.task = self.data[0]
        self.tries = 0
        return Shown(text=self.task["question"])

    def step(self, action: Answer, timeout_s: float | None = None, **kwargs: object) -> Shown:
        self.tries += 1
        score = float(self.data.score_answer(action.answer.strip(), self.task))
        done = score == 1.0 or self.tries >= options.tries
        return Shown(text="" if done else "That is not right. Try again.", reward=score if done else 0.0, done=done)

    @property
    def state(self) -> State:
        return State(step_count=self.tries)


app = create_app(Puzzle, Answer, Shown, env_name="puzzle", max_concurrent_envs=options.sessions)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
