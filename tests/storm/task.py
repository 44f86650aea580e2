"""The storm's prompts and reward. Light: the environment's worker processes import it."""

from collections.abc import Iterator
from typing import Any

WANTED = "7"


def prompts() -> Iterator[dict[str, Any]]:
    """Without end, each with a number of its own."""
    number = 0
    while True:
        yield {"prompt": f"{number % 100}=", "number": number}
        number += 1


def reward(prompt: str, completion: str, row: dict[str, Any]) -> float:
    """The share of characters that are the wanted one: something to learn for a table of bigrams."""
    del prompt, row
    return completion.count(WANTED) / len(completion) if completion else 0.0
