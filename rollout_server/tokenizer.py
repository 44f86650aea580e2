"""Tokenizer: the little that episodes need of one; transformers' tokenizers fit as they are."""

from collections.abc import Sequence
from typing import Any, Protocol, cast

from common.fingerprint import TokenizerFacts


class Tokenizer(TokenizerFacts, Protocol):
    bos_token: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int] | str:
        """Called with return_dict=False; ids with tokenize=True, else the text.

        Raises ValueError or jinja2.TemplateError when it cannot render.
        """
        ...


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of a Hugging Face model, by name or directory; raises OSError or ValueError if there is none."""
    from transformers import AutoTokenizer  # takes seconds to import, and tests with a small tokenizer need none of it

    return cast(Tokenizer, AutoTokenizer.from_pretrained(model))


def model_config(model: str) -> dict[str, Any]:
    """The Hugging Face configuration of a model; raises OSError or ValueError if there is none."""
    from transformers import AutoConfig

    return cast(dict[str, Any], AutoConfig.from_pretrained(model).to_dict())
