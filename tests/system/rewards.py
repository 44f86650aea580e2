"""Reward functions for whole systems: slow ones, and ones that are wrong for some prompts."""

import asyncio
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

FAULTS = ("raises", "hangs", "nan")
SOUND_REWARD = 1.0  # of every sound task at least: a reward made up for a faulty one would pull the mean below

TAKES_S = 0.2


def prompts_with_faults() -> Iterator[dict[str, Any]]:
    """Fifteen tasks, three of which have no reward."""
    for number in range(15):
        yield {"prompt": f"{number:04d}=", "fault": FAULTS[number // 5] if number % 5 == 0 else ""}


def faulty(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    match row["fault"]:
        case "raises":
            raise LookupError(f"no answer is known to {prompt}")
        case "hangs":
            threading.Event().wait()
        case "nan":
            return math.nan
    return SOUND_REWARD + len(completion) / 100


async def slow(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """Makes a step take long enough for a test to interrupt it."""
    del prompt, row
    await asyncio.sleep(TAKES_S)
    return len(completion) / 100
