"""Prompts: what the policy reads, as token ids."""

from collections.abc import Sequence

import numpy as np
from jinja2 import TemplateError

from rollout_server.environments.environment import BadRow, Message, Observation
from rollout_server.tokenizer import Tokenizer


def prompt_ids(observation: Observation, tokenizer: Tokenizer) -> np.ndarray:
    """[T] int32, T > 0; raises BadRow for a prompt that this tokenizer cannot make ids of.

    A text gets the tokenizer's special tokens, unless it brings its own; a chat gets those of its template.
    """
    try:
        ids = _text_ids(observation, tokenizer) if isinstance(observation, str) else _chat_ids(observation, tokenizer)
    except (ValueError, TypeError, TemplateError) as error:
        raise BadRow(f"the prompt cannot be tokenized: {error}") from error
    if not ids:
        raise BadRow("the prompt has no tokens")
    return np.asarray(ids, dtype=np.int32)


def continuation_ids(text: str, tokenizer: Tokenizer) -> np.ndarray:
    """[T] int32: text in the middle of an episode, with no special tokens around it."""
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)


def render(messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    """The text of a chat up to where the policy speaks next; raises ValueError or TemplateError."""
    conversation = [dict(message) for message in messages]
    return str(
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False, return_dict=False)
    )


def _text_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    brings_its_own = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer.encode(text, add_special_tokens=not brings_its_own)


def _chat_ids(messages: Observation, tokenizer: Tokenizer) -> list[int]:
    if tokenizer.chat_template is None:
        raise BadRow("the prompt is a chat, but the tokenizer has no chat template; give a text")
    conversation = [dict(message) for message in messages if not isinstance(message, str)]
    ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)
    return list(ids) if not isinstance(ids, str) else []
