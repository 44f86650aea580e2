"""The storm's prompts and reward. Light: the environment's worker processes import it."""

import asyncio
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

WANTED = "7"
MEDIAN_S = 0.05


def prompts() -> Iterator[dict[str, Any]]:
    """Without end, each with a number of its own."""
    number = 0
    while True:
        yield {"prompt": f"{number % 100}=", "number": number}
        number += 1


def evaluation_prompts() -> Iterator[dict[str, Any]]:
    """None of the prompts above, so that nothing is held out there: the number of a row is that of its task."""
    return ({"prompt": f"{number}+", "number": -1} for number in range(20))


def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """The share of characters that are the wanted one: something to learn for a table of bigrams."""
    del prompt, row
    return completion.count(WANTED) / len(completion) if completion else 0.0


def recorded_reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """The same; every prompt that is answered is a line of a file in the working directory."""
    with Path("answered.txt").open("a") as file:
        file.write(f"{prompt}\n")
    return reward(prompt, completion, row)


def noted_reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """The same; the row's number and each reward are a line of a file in the working directory."""
    found = reward(prompt, completion, row)
    with Path("rewards.jsonl").open("a") as file:
        file.write(json.dumps([row["number"], found]) + "\n")
    return found


async def slow_reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """The same, after a log-normal time of its own for each prompt: median 50 ms, 99th percentile ten times that."""
    spread = math.log(10.0) / NormalDist().inv_cdf(0.99)
    await asyncio.sleep(MEDIAN_S * random.Random(row["number"]).lognormvariate(0.0, spread))
    return reward(prompt, completion, row)
