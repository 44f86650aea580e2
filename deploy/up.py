"""`countercurrent up`: learner and rollout servers of one run as separate processes on this machine."""

import asyncio
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

from common.lifecycle import EXIT_USER_ERROR, ChildProcess, UserError
from learner.config import LearnerConfig

logger = logging.getLogger(__name__)

MAX_RESTARTS = 5
RESTART_PAUSE_S = 1.0
FAREWELL_S = 5.0  # after the learner ended, for the rollout servers to hear of it


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What `up` starts."""

    config: Path
    learner: LearnerConfig
    learner_flags: tuple[str, ...]
    num_rollout_servers: int


def a_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def up(plan: RunPlan) -> int:
    """Runs until the learner ends; returns its exit code. A rollout server that dies is started again."""
    address = f"tcp://127.0.0.1:{a_free_port()}"
    plan.learner.run_dir.mkdir(parents=True, exist_ok=True)
    async with asyncio.TaskGroup() as tasks:  # a cancellation stops all processes at the same time
        servers = [
            tasks.create_task(keep_rollout_server(plan, index, address)) for index in range(plan.num_rollout_servers)
        ]
        code = await asyncio.shield(tasks.create_task(run_learner(plan, address)))
        _, pending = await asyncio.wait(servers, timeout=FAREWELL_S)
        for server in pending:
            server.cancel()
    return code


async def run_learner(plan: RunPlan, address: str) -> int:
    flags = ["--config", str(plan.config), "--listen", address, *plan.learner_flags]
    async with ChildProcess.run_module("learner", *flags) as learner:
        return await learner.wait()


async def keep_rollout_server(plan: RunPlan, index: int, address: str) -> None:
    """One rollout server, started again when it dies; gives up when it keeps dying."""
    directory = plan.learner.run_dir / f"rollout-server-{index}"
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "log.txt"
    flags = [
        "--config", str(plan.config), "--learner", address, "--run-dir", str(directory), "--name", f"server-{index}",
    ]  # fmt: skip
    for _ in range(MAX_RESTARTS + 1):
        async with ChildProcess.run_module("rollout_server", *flags, output=log) as server:
            code = await server.wait()
        if code == 0:
            return
        if code == EXIT_USER_ERROR:
            raise UserError(f"rollout server {index} cannot run: {last_line(log)}")
        logger.warning("rollout server %d ended with exit code %d; %s says why", index, code, log)
        await asyncio.sleep(RESTART_PAUSE_S)
    raise UserError(f"rollout server {index} died {MAX_RESTARTS + 1} times; {log} says why")


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"{log} is empty"
