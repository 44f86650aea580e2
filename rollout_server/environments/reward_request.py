"""What OpenRLHF asks its reward servers, and what they answer: bytes in and out, no sockets."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

from rollout_server.environments.environment import EnvironmentFailure, FailureKind, check_reward


@dataclass(slots=True, eq=False)
class Question:
    """One completion to be rewarded, and who waits for it."""

    query: str  # prompt and completion, with special tokens
    prompt: str
    label: Any  # of the row
    reward: asyncio.Future[float]
    tries: int = 0

    def settle(self, value: object) -> None:
        """With what the server said, which may be no plausible number."""
        try:
            reward = check_reward(value)
        except EnvironmentFailure as failure:
            self.fail(failure.kind, failure.reason)
            return
        if not self.reward.done():
            self.reward.set_result(reward)

    def fail(self, kind: FailureKind, reason: str) -> None:
        if not self.reward.done():
            self.reward.set_exception(EnvironmentFailure(kind, reason))


def request_body(questions: list[Question]) -> bytes:
    """Byte for byte what OpenRLHF's remote_rm_fn posts."""
    fields = {
        "query": [question.query for question in questions],
        "prompts": [question.prompt for question in questions],
        "labels": [question.label for question in questions],
    }
    return json.dumps(fields).encode()


def read_rewards(content: bytes, *, expected: int) -> list[object]:
    """The rewards as they came, NaN and all; raises EnvironmentFailure for what is no reply to `expected` queries."""
    try:
        reply = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise EnvironmentFailure("environment_error", f"the reply is not JSON: {error}") from error
    rewards = reply.get("rewards") if isinstance(reply, dict) else None
    if not isinstance(rewards, list):
        raise EnvironmentFailure("environment_error", 'the reply has no list of "rewards"')
    if len(rewards) != expected:
        raise EnvironmentFailure("environment_error", f"{expected} queries were answered with {len(rewards)} rewards")
    return rewards
