"""One run of the demo without servers: the learner's own engine and batches, groups sampled by past policies.

`python -m tests.learning.run --output FILE --model DIRECTORY [learner flags]` writes what the run did as JSON.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from learner.__main__ import parse_learner
from learner.batching import build_batch
from learner.config import LearnerConfig
from learner.demo.task import evaluation_prompts, reward, shuffled_reward, training_prompts
from learner.plan import train_settings
from learner.torch_engine import open_torch_engine
from tests.learning.sampler import PastPolicies, batches

CONFIG = Path("deploy/quickstart/quickstart.toml")
EVALUATE_EVERY_STEPS = 10
EVALUATION_ROWS = 256
REWARDS = {"python:learner.demo.task:reward": reward, "python:learner.demo.task:shuffled_reward": shuffled_reward}


def learn(config: LearnerConfig, model: str) -> dict[str, Any]:
    """Train `model` for config.total_steps; what was measured on the way."""
    settings = train_settings(config, model)
    engine = open_torch_engine(settings)
    policies = PastPolicies(
        model,
        max_staleness=settings.max_staleness,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        seed=settings.seed,
    )
    policies.push(engine.snapshot_tensors())
    rows = batches(functools.partial(training_prompts, settings.seed), config.groups_per_step)
    scored_by = REWARDS[config.environment.specs[0].url]
    evaluations, steps = [evaluate(policies)], []
    started_s = time.monotonic()
    while engine.version < settings.total_steps:
        groups = policies.sample(next(rows), config.group_size, scored_by)
        batch = build_batch(
            groups,
            version=engine.version,
            max_staleness=settings.max_staleness,
            micro_batch_tokens=settings.micro_batch_tokens,
        )
        result = engine.step(batch)
        if result.refusal is not None:
            break  # what is reported is what was reached
        steps.append({"step": engine.version, **result.metrics})
        policies.push(engine.snapshot_tensors())
        if engine.version % EVALUATE_EVERY_STEPS == 0:
            evaluations.append(evaluate(policies))
    return {"steps": steps, "evaluations": evaluations, "seconds": time.monotonic() - started_s}


def evaluate(policies: PastPolicies) -> dict[str, float]:
    """The newest policy on held-out prompts: mean reward of samples, share that greedy decoding answers right."""
    rows = list(evaluation_prompts())
    rows = rows[:: len(rows) // EVALUATION_ROWS][:EVALUATION_ROWS]
    sampled, best = (policies.answers(rows, greedy=greedy) for greedy in (False, True))
    rewards = [reward(row["prompt"], answer, row) for row, answer in zip(rows, sampled, strict=True)]
    right = [answer == row["answer"] for row, answer in zip(rows, best, strict=True)]
    return {"version": policies.version, "reward": statistics.fmean(rewards), "accuracy": statistics.fmean(right)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.learning.run", description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", required=True)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(1)
    config = parse_learner(["--config", str(CONFIG), *flags])
    result = {"flags": flags} | learn(config, arguments.model)
    unfinished = arguments.output.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result))
    unfinished.rename(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
