"""The commands with agents: a learner, a rollout server with its gateway and an agent server, until they are done."""

import pytest

from common.lifecycle import ChildProcess
from tests.system.processes import LEARNER, Stage


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_run_with_an_agent_server_is_finished_by_the_commands(stage: Stage, unused_tcp_port: int):
    agents = stage.path / "agents.log"
    arguments = ("tests.system.agent_server", str(unused_tcp_port))
    async with ChildProcess.run_module(*arguments, output=agents):
        url = f"agent+http://127.0.0.1:{unused_tcp_port}/run"
        learner = await stage.start(*LEARNER, "--environment", url, "--total-steps", "4")
        server = await stage.start(*await learner.join_command())
        await server.says(r"agents reach the policy at http://127\.0\.0\.1:\d+/v1")
        for command in (learner, server):
            assert await command.exit_code() == 0, repr(command)
            assert "Traceback" not in command.log
    assert stage.steps() == [1, 2, 3, 4]
