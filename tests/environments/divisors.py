"""What the demo model needs to play the divisors of learning_server.py: prompts in its characters."""

import re
from collections.abc import Iterator, Mapping
from typing import Any


def rows() -> Iterator[dict[str, str]]:
    """Every task is made by the server, from its seed."""
    while True:
        yield {"prompt": " "}


def numbers_alone(observation: Mapping[str, Any]) -> str:
    """'Find the Greatest Common Divisor (GCD) of these numbers: 8, 4. ...' -> '8,4='"""
    return ",".join(re.findall(r"\d+", observation["text"])) + "="
