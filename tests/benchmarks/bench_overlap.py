"""What the pipeline costs: its wall time over the slower of generation and training alone.

Generation has one core and training the other. The control runs both side by side and unconnected, so that they fight
for the same memory and caches. Pipeline and control alternate. Run as `python -m tests.benchmarks.bench_overlap`.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvloop

from common.events import intersect, intervals_of, length_s, read_events
from common.lifecycle import ChildProcess
from deploy.up import a_free_port
from tests.benchmarks import overlap_workload as workload

GENERATION_CORE, TRAINING_CORE = 0, 1
TIMEOUT_S = 300.0
POLL_S = 0.02
GATE, GOAL = 1.15, 1.03


@dataclass(frozen=True)
class PipelineRun:
    wall_s: float  # from the first lease's work to the end of the last step
    learner_idle: float
    generation_idle: float


@asynccontextmanager
async def pinned(core: int, module: str, *arguments: str, log: Path) -> AsyncIterator[ChildProcess]:
    """A child, and its own children, on one core: it inherits the affinity it is started with."""
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    child = ChildProcess.run_module(module, *arguments, output=log)
    try:
        async with child as process:
            os.sched_setaffinity(0, everywhere)
            yield process
    finally:
        os.sched_setaffinity(0, everywhere)


async def succeeded(process: ChildProcess, log: Path) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        code = await process.wait()
    if code != 0:
        raise RuntimeError(f"a process ended with exit code {code}; {log} says why")


async def run_pipeline(directory: Path, name: str, max_staleness: int) -> PipelineRun:
    run_dir = directory / name
    run_dir.mkdir()
    address = f"tcp://127.0.0.1:{a_free_port()}"
    learner_flags = {
        "model": directory / "model", "data": workload.DATA, "environment": workload.ENVIRONMENT, "listen": address,
        "run-dir": run_dir, "total-steps": workload.STEPS, "groups-per-step": workload.GROUPS_PER_STEP,
        "group-size": workload.GROUP_SIZE, "max-new-tokens": workload.MAX_NEW_TOKENS, "learning-rate": 0.0,
        "max-model-len": workload.MAX_MODEL_LEN, "max-staleness": max_staleness, "checkpoint-every-steps": 1 << 20,
    }  # fmt: skip
    server_flags = {"learner": address, "run-dir": run_dir / "server"}
    logs = run_dir / "learner.log", run_dir / "server.log"
    async with (
        pinned(TRAINING_CORE, "learner", *flags(learner_flags), log=logs[0]) as learner,
        pinned(GENERATION_CORE, "rollout_server", *flags(server_flags), log=logs[1]) as server,
    ):
        await succeeded(learner, logs[0])
        await succeeded(server, logs[1])
    events = read_events(run_dir.rglob("events-*.jsonl"))
    generation, training = intervals_of(events, "generate"), intervals_of(events, "train")
    span = [(generation[0][0], training[-1][1])]
    wall_s = length_s(span)
    busy = [length_s(intersect(each, span)) / wall_s for each in (training, generation)]
    return PipelineRun(wall_s, 1 - busy[0], 1 - busy[1])


async def run_control(directory: Path) -> tuple[float, float]:
    """(generation alone, training alone) in seconds, both running at the same time."""
    for leftover in ("go", "generation.ready", "training.ready"):
        (directory / leftover).unlink(missing_ok=True)
    module = workload.__name__
    logs = directory / "generation.log", directory / "training.log"
    async with (
        pinned(GENERATION_CORE, module, "generation", str(directory), log=logs[0]) as generation,
        pinned(TRAINING_CORE, module, "training", str(directory), log=logs[1]) as training,
    ):
        async with asyncio.timeout(TIMEOUT_S):
            while not all((directory / f"{half}.ready").exists() for half in ("generation", "training")):
                await asyncio.sleep(POLL_S)
        (directory / "go").touch()
        await succeeded(generation, logs[0])
        await succeeded(training, logs[1])
    walls = [json.loads((directory / f"{half}.json").read_text())["wall_s"] for half in ("generation", "training")]
    return walls[0], walls[1]


def flags(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


async def bench(pairs: int) -> int:
    with tempfile.TemporaryDirectory(prefix="countercurrent-bench-") as name:
        directory = Path(name)
        workload.build_model(directory / "model")
        (directory / "go").touch()
        log = directory / "recording.log"
        async with pinned(GENERATION_CORE, workload.__name__, "recording", str(directory), log=log) as recording:
            await succeeded(recording, log)
        ratios: list[float] = []
        print(f"{workload.STEPS} steps; seconds of wall time")
        print(
            "pair  generation  training  pipeline  ratio  learner idle  generation idle  | staleness 0: pipeline  ratio"
        )
        for pair in range(pairs):
            generation_s, training_s = await run_control(directory)
            run = await run_pipeline(directory, f"pipeline-{pair}", max_staleness=2)
            synchronous = await run_pipeline(directory, f"synchronous-{pair}", max_staleness=0)
            slower_s = max(generation_s, training_s)
            ratios.append(run.wall_s / slower_s)
            print(
                f"{pair + 1:4}  {generation_s:10.2f}  {training_s:8.2f}  {run.wall_s:8.2f}  {ratios[-1]:5.3f}  "
                f"{run.learner_idle:12.0%}  {run.generation_idle:15.0%}  | {synchronous.wall_s:14.2f}  "
                f"{synchronous.wall_s / slower_s:5.3f}",
                flush=True,
            )
        median = statistics.median(ratios)
        print(f"median ratio {median:.3f}: gate {GATE} {'met' if median <= GATE else 'MISSED'}, goal {GOAL}")
    return 0 if median <= GATE else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="of control and pipeline (default: 5)")
    arguments = parser.parse_args()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("two cores are needed: one for generation, one for training")
    return uvloop.run(bench(arguments.pairs))


if __name__ == "__main__":
    sys.exit(main())
