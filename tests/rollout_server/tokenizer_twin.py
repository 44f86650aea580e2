"""CharacterTokenizer: a small real Tokenizer; each digit and letter is one token, a turn ends with <eos>\\n."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz =+?\n[.]"
BOS_ID, EOS_ID, USER_ID, POLICY_ID = range(4)
SPECIAL = ["<bos>", "<eos>", "<user>", "<policy>"]


class CharacterTokenizer:
    bos_token: str | None = "<bos>"
    bos_token_id: int | None = BOS_ID
    eos_token_id: int | None = EOS_ID
    pad_token_id: int | None = None

    def __init__(self, chat_template: str | None = "<user>...<policy>") -> None:
        self.chat_template = chat_template

    @property
    def vocab_size(self) -> int:
        return len(SPECIAL) + len(ALPHABET)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids = [BOS_ID] if add_special_tokens else []
        while text:
            for token, token_id in self.get_vocab().items():
                if text.startswith(token):
                    ids.append(token_id)
                    text = text[len(token) :]
                    break
            else:
                raise ValueError(f"no token for {text[0]!r}")
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        tokens = [*SPECIAL, *ALPHABET]
        return "".join(tokens[each] for each in token_ids if not (skip_special_tokens and each < len(SPECIAL)))

    def apply_chat_template(
        self, conversation: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool, return_dict: bool
    ) -> list[int] | str:
        assert add_generation_prompt
        assert not return_dict
        if any(message["role"] not in ("user", "assistant") for message in conversation):
            raise TemplateError("only users and the policy may speak")
        said = {"user": "<user>{}", "assistant": "<policy>{}<eos>\n"}
        text = "<bos>" + "".join(said[each["role"]].format(each["content"]) for each in conversation) + "<policy>"
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def get_vocab(self) -> Mapping[str, int]:
        return {token: index for index, token in enumerate([*SPECIAL, *ALPHABET])}
