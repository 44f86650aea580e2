"""The demo task: copy four digits. `3142=` is answered by `3142`.

One prompt in five is held out of training by a hash of it: what is reported of these is generalisation.
"""

import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

NUM_DIGITS = 4
HELD_OUT_ONE_IN = 5

Row = dict[str, str]


def is_held_out(digits: str) -> bool:
    return zlib.crc32(digits.encode()) % HELD_OUT_ONE_IN == 0


def rows() -> Iterator[Row]:
    for number in range(10**NUM_DIGITS):
        digits = f"{number:0{NUM_DIGITS}d}"
        yield {"prompt": f"{digits}=", "answer": digits}


def training_prompts(seed: int = 0) -> Iterator[Row]:
    """The rows that may be trained on, in an order that the seed gives."""
    chosen = [row for row in rows() if not is_held_out(row["answer"])]
    random.Random(seed).shuffle(chosen)
    return iter(chosen)


def evaluation_prompts() -> Iterator[Row]:
    """The rows that are never trained on, in an order that says nothing."""
    chosen = [row for row in rows() if is_held_out(row["answer"])]
    random.Random(0).shuffle(chosen)
    return iter(chosen)


def reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """1 for the right answer, else half the share of right digits: something to climb from nothing."""
    del prompt
    return score(completion, str(row["answer"]))


def shuffled_reward(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """The control: the reward for another prompt's answer. It has the same distribution and nothing to learn."""
    del row
    unrelated = zlib.crc32(f"{prompt}{completion}".encode()) % 10**NUM_DIGITS
    return score(completion, f"{unrelated:0{NUM_DIGITS}d}")


def score(completion: str, answer: str) -> float:
    if completion == answer:
        return 1.0
    right = sum(given == expected for given, expected in zip(completion, answer, strict=False))
    # Over the longer of the two: a policy that never stops must not be content with half.
    return 0.5 * right / max(len(answer), len(completion))
