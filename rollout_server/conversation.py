"""Conversation: what the policy reads next, turn after turn, as ids that are appended, never made again from text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jinja2 import TemplateError

from rollout_server.environments.environment import EnvironmentFailure, Message, Observation
from rollout_server.prompts import continuation_ids, prompt_ids, render
from rollout_server.tokenizer import Tokenizer

PROBE = "what was said"  # no template changes these words
MAX_CHARS_PER_TOKEN = 8  # more of a text is not even tokenized: that would hold up everything else
SHRINK = 0.95


@dataclass(frozen=True, slots=True, eq=False)
class Continuation:
    """How the ids go on. forks: these are all ids of the next prompt, because the template changed what came before."""

    token_ids: np.ndarray  # [N] int32
    forks: bool = False


class Conversation:
    """An episode that begins with a text goes on with texts, appended as they are. One that begins with chat messages
    goes on with what the tokenizer's template puts between what was said and the next turn of the policy.

    A template that changes earlier turns (most thinking templates leave out their thoughts) has no continuation: the
    next prompt is then a new one, as the model would read it anywhere else, and the sample forks.
    """

    def __init__(self, first: Observation, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._messages = None if isinstance(first, str) else list(first)

    def continuation(self, said: str, end: str, observation: Observation) -> Continuation:
        """After the policy said `said`, its last token being `end` as text, and the environment answered.

        Raises EnvironmentFailure when the template cannot render the answer.
        """
        if self._messages is None and not isinstance(observation, str):
            raise EnvironmentFailure("environment_error", "chat messages came after a prompt that is a text")
        try:
            if self._messages is None:
                return Continuation(continuation_ids(str(observation), self._tokenizer))
            return self._chat(self._messages, said, end, as_messages(observation))
        except (ValueError, TypeError, TemplateError) as error:
            raise EnvironmentFailure("environment_error", f"the observation cannot be rendered: {error}") from error

    def _chat(self, messages: list[Message], said: str, end: str, heard: Sequence[Message]) -> Continuation:
        before = render(messages, self._tokenizer)
        after = [*messages, {"role": "assistant", "content": said}, *heard]
        probe = render([*messages, {"role": "assistant", "content": PROBE}, *heard], self._tokenizer)
        tail = probe.removeprefix(before + PROBE)
        whole = render(after, self._tokenizer)
        is_kept = whole.startswith(before) and whole.endswith(tail) and tail != probe
        if not is_kept or whole[len(before) : len(whole) - len(tail)].strip() != said.strip():
            return Continuation(prompt_ids(after, self._tokenizer), forks=True)
        return Continuation(continuation_ids(tail.removeprefix(end), self._tokenizer))

    def go_on(self, said: str, observation: Observation) -> None:
        """What was said and heard is part of the conversation from now on."""
        if self._messages is not None:
            self._messages += [{"role": "assistant", "content": said}, *as_messages(observation)]


def as_messages(observation: Observation) -> Sequence[Message]:
    """A text in a chat is the next message of the user."""
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else observation


def fit(
    observation: Observation, continue_with: Callable[[Observation], Continuation], room: Callable[[Continuation], int]
) -> tuple[Observation, Continuation] | None:
    """The observation, cut with a visible mark if it must be, and a continuation of at most `room` tokens.

    None when not even the mark fits.
    """
    longest = longest_text(observation)
    kept = len(longest)
    if (most := MAX_CHARS_PER_TOKEN * max(0, room(Continuation(np.zeros(0))))) < kept:
        kept = most
    while True:
        shown = replaced(observation, longest, cut(longest, kept))
        continuation = continue_with(shown)
        allowed = room(continuation)
        if continuation.token_ids.size <= allowed:
            return shown, continuation
        if kept <= 0:
            return None
        kept = int(kept * SHRINK * max(0, allowed) / continuation.token_ids.size)


def cut(text: str, num_kept: int) -> str:
    """Its beginning and its end, num_kept characters in all, around a mark that says how many are missing."""
    missing = len(text) - num_kept
    if missing <= 0:
        return text
    head = (num_kept + 1) // 2
    return f"{text[:head]}\n[... {missing} characters left out ...]\n{text[head + missing :]}"


def longest_text(observation: Observation) -> str:
    """The text of an observation that is cut when it is too long."""
    if isinstance(observation, str):
        return observation
    return max((str(message["content"]) for message in observation if _is_text(message)), key=len, default="")


def replaced(observation: Observation, text: str, by: str) -> Observation:
    if isinstance(observation, str):
        return by
    return [
        {**message, "content": by} if _is_text(message) and message["content"] == text else message
        for message in observation
    ]


def _is_text(message: Message) -> bool:
    return isinstance(message.get("content"), str)
