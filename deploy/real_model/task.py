"""Sums of two digits from reasoning-gym, for a model that half knows them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import reasoning_gym

ROWS = 1 << 20
_NUMBER = re.compile(r"-?\d+")
_sums = reasoning_gym.create_dataset(
    "chain_sum", size=ROWS, seed=0, min_terms=2, max_terms=2, min_digits=1, max_digits=1
)


def rows() -> Iterator[dict[str, Any]]:
    """A chat for each task, and what the scorer needs."""
    for index in range(ROWS):
        entry = _sums[index]
        instruction = f"{entry['question']} Say the number alone."
        yield {"prompt": [{"role": "user", "content": instruction}], "answer": entry["answer"]}


def score(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
    """reasoning-gym's score of the last number that was said; 0 where none was."""
    del prompt
    numbers = _NUMBER.findall(completion)
    return float(_sums.score_answer(numbers[-1], {"answer": row["answer"]})) if numbers else 0.0
