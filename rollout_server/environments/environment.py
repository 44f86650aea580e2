"""Environment: what an episode needs of one, and what it must say when there is no reward."""

import math
import numbers
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, runtime_checkable

import msgspec

from common.environments import EnvironmentSettings
from common.lifecycle import UserError
from common.messages import MAX_REWARD
from rollout_server.environments.responses_input import PARAMS, UnusableInput, chat_messages

if TYPE_CHECKING:
    from rollout_server.gateway.session import Session  # it needs what this module defines

Message = Mapping[str, Any]
"""One chat message: at least "role" and "content"."""

Observation = str | Sequence[Message]
"""What the policy reads first: a text, taken as it is, or chat messages, rendered by the tokenizer's template."""

FailureKind = Literal["environment_error", "environment_timeout", "environment_unavailable", "bad_reward", "masked"]
"""environment_unavailable: it could not be reached, which says nothing about the task, so the task waits for it.
masked: the environment itself says that this episode must not be trained on."""

MAX_REASON_CHARS = 1000


class BadRow(ValueError):
    """A dataset row that no episode can start from."""


class EnvironmentStartError(UserError):
    """The environment cannot be used at all; the message names it and says what to do."""


class EnvironmentFailure(Exception):
    """An episode has no reward, which is not reward 0: its trajectory must not be trained on."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind: FailureKind = kind
        self.reason = reason[:MAX_REASON_CHARS]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of the dataset: a JSON object with at least "prompt", or "responses_create_params" as NeMo Gym's have."""

    json: bytes
    fields: Mapping[str, Any]
    prompt: Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the policy said in one turn."""

    text: str  # without special tokens
    is_cut: bool = False  # it would have said more, and had no room to
    read_prompt: Callable[[], str] = str  # the first observation as the policy read it, special tokens included
    read_all: Callable[[], str] = str  # everything up to the end of this turn, special tokens included


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The environment's answer to one turn of the policy."""

    reward: float  # of this step alone; finite, at most MAX_REWARD in size
    done: bool
    truncated: bool = False  # done because a limit was reached, not because the task came to its end
    observation: Observation = ""  # what the policy reads next; a text after a chat is the user's next message
    end: Callable[[], Awaitable[float]] | None = (
        None  # reward for ending here, where the policy has no turn or room left
    )


class Episode(Protocol):
    """One run of one task. Each method raises EnvironmentFailure; nothing may be called after that."""

    async def reset(self) -> Observation:
        """The first thing the policy reads."""
        ...

    async def step(self, said: Said) -> StepResult:
        """Act with what the policy said; must not be called once done."""
        ...


class Environment(Protocol):
    """Where episodes happen. An async context manager: entering raises EnvironmentStartError, leaving frees all.

    A server that cannot be reached is no reason for EnvironmentStartError: it may come later.
    """

    url: str
    settings: EnvironmentSettings

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def episode(self, row: Row, *, seed: int) -> AbstractAsyncContextManager[Episode]:
        """A new episode; those with the same row and seed start alike. Leaving the context ends it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How an episode ended that an agent drove."""

    reward: float  # of the whole episode; finite, at most MAX_REWARD in size
    truncated: bool = False  # a limit was reached; the task did not come to its end


@runtime_checkable
class AgentEnvironment(Protocol):
    """Where agents drive the episodes, by calling the gateway; otherwise as Environment."""

    url: str
    settings: EnvironmentSettings

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def play(self, row: Row, session: "Session", *, seed: int) -> Outcome:
        """Have an agent play the row in the session; returns when it is done. Raises EnvironmentFailure and BadRow.

        The session is closed afterwards, and what its calls have sampled becomes trajectories with the reward. The
        call is cancelled after settings.episode_timeout_s, and when the engine or the lease fails.
        """
        ...


def parse_row(row_json: bytes) -> Row:
    """Raises BadRow unless the bytes are a JSON object whose prompt is a text or a list of chat messages."""
    try:
        fields = msgspec.json.decode(row_json, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRow(f"the row is not a JSON object: {error}") from error
    return Row(json=row_json, fields=fields, prompt=_prompt(fields))


def _prompt(fields: Mapping[str, Any]) -> Observation:
    if "prompt" not in fields and PARAMS in fields:
        try:
            return chat_messages(fields[PARAMS])
        except UnusableInput as error:
            raise BadRow(str(error)) from error
    if "prompt" not in fields:
        raise BadRow(f'the row has no "prompt"; it has: {", ".join(sorted(fields)) or "nothing"}')
    prompt = fields["prompt"]
    if isinstance(prompt, str):
        if not prompt:
            raise BadRow('"prompt" is empty')
    elif not are_messages(prompt):
        raise BadRow('"prompt" must be a text or a list of {"role": ..., "content": ...}')
    return prompt  # type: ignore[no-any-return]  # one of the two


def are_messages(prompt: object) -> bool:
    """Whether it is a list of chat messages."""
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) and "content" in each for each in prompt)
    )


def check_reward(value: object) -> float:
    """The reward as a float; raises EnvironmentFailure("bad_reward") for all that is not a plausible number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise EnvironmentFailure("bad_reward", f"a reward must be a number, got {type(value).__name__} {_shown(value)}")
    try:
        reward = float(value)
    except OverflowError as error:
        raise EnvironmentFailure("bad_reward", "the reward is too large for a float") from error
    if not math.isfinite(reward):
        raise EnvironmentFailure("bad_reward", f"a reward must be finite, got {reward}")
    if abs(reward) > MAX_REWARD:
        raise EnvironmentFailure("bad_reward", f"a reward must lie within ±{MAX_REWARD:g}, got {reward:g}")
    return reward


def step_reward(value: object, *, done: bool) -> float:
    """As check_reward. None is 0 in the middle of an episode, and nothing at its end: it may stand for a NaN."""
    return 0.0 if value is None and not done else check_reward(value)


def _shown(value: object) -> str:
    # Only of types whose repr is known to be harmless: the value comes from foreign code.
    return repr(value)[:80] if isinstance(value, str | bool | None) else ""
