"""Chats: the token ids of an agent's prompts. What the policy has said in them stays as it was sampled."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from rollout_server.conversation import MAX_CHARS_PER_TOKEN, PROBE
from rollout_server.environments.environment import BadRow
from rollout_server.gateway.api_error import ApiError
from rollout_server.gateway.api_requests import Message
from rollout_server.gateway.tools import Parsed, ToolParser, canonical
from rollout_server.prompts import continuation_ids, prompt_ids
from rollout_server.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spoken:
    """One answer of the policy, as it was sampled and as the agent was given it."""

    token_ids: np.ndarray  # [T] int32; the prompt and the answer
    end: str  # the last token, as text
    parsed: Parsed


class Chats:
    """The chats and texts of one session.

    A request whose messages begin with those of an earlier one and the answer to it has the ids of both, and after
    them what the tokenizer's template puts there. Where the template changes what came before, as thinking templates
    do, and where the agent has, the ids are those of the whole chat as the template makes it.
    """

    def __init__(self, tokenizer: Tokenizer, parser: ToolParser, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._parser = parser
        self._max_model_len = max_model_len
        self._spoken: dict[bytes, Spoken] = {}  # by the chat up to and with the answer
        self._texts: dict[str, np.ndarray] = {}  # prompt and answer -> ids

    # --- chats -------------------------------------------------------------------------------------------------------

    def chat_ids(self, messages: Sequence[Message], tools: Tools) -> np.ndarray:
        """[T] int32; raises ApiError for a chat that the template cannot render, or that cannot fit."""
        self._check_length(sum(len(message.text) for message in messages))
        shown = [_for_template(message) for message in messages]
        try:
            return self._continued(messages, shown, tools)
        except (ValueError, TypeError, TemplateError, BadRow) as error:
            raise ApiError(400, "invalid_request", f"the chat cannot be rendered: {error}") from error

    def _continued(self, messages: Sequence[Message], shown: list[dict[str, Any]], tools: Tools) -> np.ndarray:
        keys = _keys(messages, tools)
        for index in reversed(range(len(messages) - 1)):
            if messages[index].role == "assistant" and (spoken := self._spoken.get(keys[index])) is not None:
                tail = self._tail(shown, index, spoken, tools)
                if tail is not None:
                    added = continuation_ids(tail.removeprefix(spoken.end), self._tokenizer)
                    return np.concatenate([spoken.token_ids, added])
                break
        return continuation_ids(self._render(shown, tools), self._tokenizer)

    def _tail(self, shown: list[dict[str, Any]], index: int, spoken: Spoken, tools: Tools) -> str | None:
        """What the template puts after message `index`; None when it leaves something before it as it was not."""
        before = self._render(shown[:index], tools)
        probed = [*shown[:index], {"role": "assistant", "content": PROBE}, *shown[index + 1 :]]
        try:
            probe = self._render(probed, tools)
        except TemplateError:  # it lets no tool speak to what was no call
            return None
        tail = probe.removeprefix(before + PROBE)
        whole = self._render(shown, tools)
        if tail == probe or not whole.startswith(before) or not whole.endswith(tail):
            return None
        kept = whole[len(before) : len(whole) - len(tail)]
        is_kept = kept.strip() == spoken.parsed.content.strip() and not spoken.parsed.calls
        return tail if is_kept or self._parser.parse(kept, tools) == spoken.parsed else None

    def remember(self, messages: Sequence[Message], tools: Tools, answer: Message, spoken: Spoken) -> None:
        """The agent has been given the answer to the messages."""
        self._spoken[_keys([*messages, answer], tools)[-1]] = spoken

    def _render(self, shown: list[dict[str, Any]], tools: Tools) -> str:
        if self._tokenizer.chat_template is None:
            raise BadRow("the tokenizer has no chat template; use /v1/completions")
        more: dict[str, Any] = {"tools": [dict(tool) for tool in tools]} if tools else {}
        return str(
            self._tokenizer.apply_chat_template(
                [dict(message) for message in shown],
                add_generation_prompt=True,
                tokenize=False,
                return_dict=False,
                **more,
            )
        )

    # --- texts -------------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> np.ndarray:
        """[T] int32; raises ApiError."""
        self._check_length(len(text))
        known = max((each for each in self._texts if text.startswith(each)), key=len, default=None)
        try:
            if known is None:
                return prompt_ids(text, self._tokenizer)
            added = continuation_ids(text[len(known) :], self._tokenizer)
        except (ValueError, BadRow) as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        return np.concatenate([self._texts[known], added])

    def remember_text(self, text: str, token_ids: np.ndarray) -> None:
        """text: of prompt and answer, as the agent has them."""
        self._texts[text] = token_ids

    def _check_length(self, num_chars: int) -> None:
        """A text that cannot fit is not even tokenized: that would hold up everything else."""
        if num_chars > MAX_CHARS_PER_TOKEN * self._max_model_len:
            raise too_long_error(self._max_model_len, f"{num_chars} characters")


def too_long_error(max_model_len: int, has: str) -> ApiError:
    """In the words by which agents know that they must shorten the prompt."""
    return ApiError(
        400, "context_length_exceeded", f"the prompt has {has}; prompt and answer have room for {max_model_len}"
    )


def _for_template(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    shown: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "type": "function",
                "id": call.id,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        shown["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        shown["name"] = message.name
    return shown


def _arguments(text: str) -> Any:
    """Templates write them as JSON themselves."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _keys(messages: Sequence[Message], tools: Tools) -> list[bytes]:
    """One for each message, of the chat up to it: equal for chats that mean the same."""
    digest = hashlib.sha256(json.dumps(list(tools), sort_keys=True).encode())
    keys = []
    for message in messages:
        said = message.text.strip() if message.role == "assistant" else message.text
        calls = [[call.function.name, canonical(call.function.arguments)] for call in message.tool_calls or []]
        digest.update(json.dumps([message.role, said, calls, message.name]).encode() + b"\n")
        keys.append(digest.digest())
    return keys
