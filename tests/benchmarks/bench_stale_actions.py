"""What the three stale actions cost on a long-tailed task: wall time, reward, and tokens that were sampled in vain.

A table policy learns from a reward that takes a log-normal time, its 99th percentile ten times its median; learner,
coordinator, journal and sockets are the real ones. The actions take turns; staleness 0 is the reference.
Run as `python -m tests.benchmarks.bench_stale_actions`.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.events import read_events
from tests.storm.fleet import Fleet

CONTENDERS = {
    "staleness 0": (0, "wait"), "wait": (2, "wait"), "requeue": (2, "requeue"), "mask": (2, "mask"),
}  # fmt: skip
GROUPS_PER_STEP, GROUP_SIZE = 8, 4
GOAL_REWARD = 0.5
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Result:
    """Of one run."""

    wall_s: float  # from the first step to the last
    goal_s: float  # until the reward reached the goal, as a mean over ten steps; infinite if it never did
    reward: float  # mean of the last tenth of the steps
    waste: float  # share of the sampled tokens that were never trained
    learner_idle: float
    staleness: float  # mean, in versions


async def run_once(directory: Path, *, max_staleness: int, action: str, seed: int, steps: int) -> Result:
    flags = (
        "--groups-per-step", GROUPS_PER_STEP, "--group-size", GROUP_SIZE, "--max-staleness", max_staleness,
        "--stale-action", action, "--total-steps", steps, "--learning-rate", 0.05, "--seed", seed,
        "--checkpoint-every-steps", 1 << 20,
    )  # fmt: skip
    fleet = Fleet(directory, flags, servers=1, reward="slow_reward")
    async with asyncio.timeout(TIMEOUT_S):
        await fleet.run()
    return result_of(
        read_events(sorted(directory.glob("run/events-learner-*.jsonl"))),
        read_events(sorted(directory.glob("server-*/events-*.jsonl"))),
    )


def result_of(learner: list[dict[str, Any]], servers: list[dict[str, Any]]) -> Result:
    steps = [event for event in learner if event["kind"] == "step"]
    waits = [event for event in learner if event["kind"] == "wait_batch"][1:]  # the first one is the start
    start_s, end_s = steps[0]["t"], steps[-1]["t"]
    smooth = [
        (event["t"] - start_s, statistics.fmean(one["reward"] for one in steps[place - 9 : place + 1]))
        for place, event in enumerate(steps)
        if place >= 9
    ]
    sampled = max(event["generated_tokens"] for event in servers if event["kind"] == "heartbeat")
    trained = sum(event["trained_tokens"] for event in steps)
    return Result(
        wall_s=end_s - start_s,
        goal_s=next((t for t, reward in smooth if reward >= GOAL_REWARD), float("inf")),
        reward=statistics.fmean(event["reward"] for event in steps[-len(steps) // 10 :]),
        waste=1 - trained / sampled,
        learner_idle=sum(event["t_end"] - event["t"] for event in waits) / (end_s - start_s),
        staleness=statistics.fmean(event["staleness_mean"] for event in steps),
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench_stale_actions", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each contender (default: 3)")
    parser.add_argument("--steps", type=int, default=250, help="optimizer steps of a run (default: 250)")
    arguments = parser.parse_args()
    results: dict[str, list[Result]] = {name: [] for name in CONTENDERS}
    for seed in range(arguments.seeds):
        for name, (max_staleness, action) in CONTENDERS.items():
            with tempfile.TemporaryDirectory(prefix="stale-") as directory:
                running = run_once(
                    Path(directory), max_staleness=max_staleness, action=action, seed=seed, steps=arguments.steps
                )
                results[name].append(asyncio.run(running))
            print(f"seed {seed}, {name}: {results[name][-1]}", file=sys.stderr, flush=True)
    print(
        f"medians of {arguments.seeds} runs of {arguments.steps} steps, {GROUPS_PER_STEP} x {GROUP_SIZE} trajectories"
    )
    print("| stale action | wall s | s to reward 0.5 | last reward | never trained | learner idle | staleness |")
    print("|---|---|---|---|---|---|---|")
    for name, runs in results.items():
        median = Result(*(statistics.median(values) for values in zip(*map(as_tuple, runs), strict=True)))
        print(
            f"| {name} | {median.wall_s:.1f} | {median.goal_s:.1f} | {median.reward:.3f} | {median.waste:.1%} | "
            f"{median.learner_idle:.0%} | {median.staleness:.2f} |"
        )
    return 0


def as_tuple(result: Result) -> tuple[float, ...]:
    return result.wall_s, result.goal_s, result.reward, result.waste, result.learner_idle, result.staleness


if __name__ == "__main__":
    sys.exit(main())
