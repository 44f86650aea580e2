"""An OpenEnv server on the real library whose actions are calls of tools. Runs where that is installed."""

import argparse

import uvicorn
from fastmcp import FastMCP
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.mcp_environment import MCPEnvironment
from openenv.core.env_server.mcp_types import CallToolAction, CallToolObservation
from openenv.core.env_server.types import Action, Observation, State

arguments = argparse.ArgumentParser()
arguments.add_argument("--port", type=int, required=True)
options = arguments.parse_args()


class Adder(MCPEnvironment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self) -> None:
        server = FastMCP("adder")

        @server.tool
        def add(a: int, b: int) -> int:
            """The sum of two numbers."""
            return a + b

        super().__init__(server)

    def reset(self, seed: int | None = None, episode_id: str | None = None, **kwargs: object) -> Observation:
        return Observation(metadata={"task": "add"}, done=False)

    def _step_impl(self, action: Action, timeout_s: float | None = None, **kwargs: object) -> Observation:
        return Observation(done=True, reward=0.0)

    @property
    def state(self) -> State:
        return State()


app = create_app(Adder, CallToolAction, CallToolObservation, env_name="adder", max_concurrent_envs=8)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")
