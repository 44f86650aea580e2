"""An OpenEnv server on the real library whose environment does what it is told. Runs where that is installed."""

import argparse
import time

import uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
arguments.add_argument("--sessions", type=int, default=64)
options = arguments.parse_args()


class Told(Action):
    text: str


class Said(Observation):
    text: str = ""


class Obedient(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: object) -> Said:
        self.steps = 0
        return Said(text=f"seed {seed} extra {sorted(kwargs.items())}", reward=0.0)

    def step(self, action: Told, timeout_s: float | None = None, **kwargs: object) -> Said:
        self.steps += 1
        command, _, argument = action.text.partition(" ")
        match command:
            case "reward":
                return Said(text="end", reward=float(argument), done=True)
            case "raise":
                raise LookupError(argument)
            case "sleep":
                time.sleep(float(argument))
            case "big":
                return Said(text="x" * int(argument), done=False)
        return Said(text=f"{self.steps}: {action.text}", reward=0.25, done=False)

    @property
    def state(self) -> State:
        return State(step_count=self.steps)


app = create_app(Obedient, Told, Said, env_name="obedient", max_concurrent_envs=options.sessions)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
