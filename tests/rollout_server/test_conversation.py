"""What comes between two turns: by the rules of real chat templates, with real tokenizers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rollout_server.conversation import Conversation, cut, longest_text, replaced
from rollout_server.environments.environment import EnvironmentFailure
from rollout_server.prompts import prompt_ids
from rollout_server.tokenizer import Tokenizer
from tests.rollout_server.test_tokenizer import a_saved_tokenizer

SPECIAL = ["<bos>", "<eos>", "<user>", "<policy>"]  # of the saved tokenizer
LIKE_CHATML = (
    "{% for m in messages %}<user>{{ m.role }}\n{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n{% endif %}"
)
LIKE_LLAMA = (
    "<bos>{% for m in messages %}<user>{{ m.role }}<policy>\n\n{{ m.content | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant<policy>\n\n{% endif %}"
)
WITHOUT_TURN_END = (
    "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<policy>{{ m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<policy>{% endif %}"
)
DROPS_THOUGHTS = (
    "{% for m in messages %}<user>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' else m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<user>assistant\n{% endif %}"
)
OPENS_THOUGHTS = DROPS_THOUGHTS.replace("<user>assistant\n{% endif %}", "<user>assistant\n<think>\n{% endif %}")
TEMPLATES = {
    "like ChatML": LIKE_CHATML,
    "like Llama": LIKE_LLAMA,
    "without an end of turn": WITHOUT_TURN_END,
    "drops thoughts": DROPS_THOUGHTS,
    "opens thoughts": OPENS_THOUGHTS,
}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    directory: Path = tmp_path_factory.mktemp("tokenizers")
    return {name: a_saved_tokenizer(directory / name, chat_template=template) for name, template in TEMPLATES.items()}


def read_after(tokenizer: Tokenizer, said: str, observation: Any, *, sampled: str | None = None) -> tuple[str, bool]:
    """(all that the policy reads next, whether it is a new beginning)"""
    log = prompt_ids(HELLO, tokenizer).tolist()
    log += tokenizer.encode((said if sampled is None else sampled) + "<eos>", add_special_tokens=False)
    continuation = Conversation(HELLO, tokenizer).continuation(said, "<eos>", observation)
    ids = continuation.token_ids.tolist()
    return tokenizer.decode(ids if continuation.forks else log + ids, skip_special_tokens=False), continuation.forks


@pytest.mark.parametrize("name", ["like ChatML", "like Llama", "drops thoughts"])
@pytest.mark.parametrize("observation", ["try again", [{"role": "tool", "content": "4"}]])
def test_what_is_read_next_is_what_the_template_makes_of_the_whole_conversation(tokenizers, name, observation):
    heard = [{"role": "user", "content": observation}] if isinstance(observation, str) else observation
    text, forks = read_after(tokenizers[name], "5?", observation)
    whole = prompt_ids([*HELLO, {"role": "assistant", "content": "5?"}, *heard], tokenizers[name]).tolist()
    assert (text, forks) == (tokenizers[name].decode(whole, skip_special_tokens=False), False)


def test_a_template_without_an_end_of_turn_keeps_the_one_that_was_sampled(tokenizers):
    text, forks = read_after(tokenizers["without an end of turn"], "5?", "no")
    assert (text, forks) == ("<user>hello<policy>5?<eos><user>no<policy>", False)


def test_white_space_that_a_template_would_trim_stays_as_it_was_sampled(tokenizers):
    text, forks = read_after(tokenizers["like Llama"], " 5? \n", "no")
    assert not forks
    assert "\n\n 5? \n<eos><user>user<policy>\n\nno<eos>" in text


def test_thoughts_that_the_template_drops_begin_a_new_prompt_as_it_would_be_rendered_anywhere(tokenizers):
    text, forks = read_after(tokenizers["drops thoughts"], "<think>hm</think>5?", "no")
    assert forks
    assert text == "<user>user\nhello<eos>\n<user>assistant\n5?<eos>\n<user>user\nno<eos>\n<user>assistant\n"


def test_thoughts_that_the_template_itself_opens_begin_a_new_prompt_too(tokenizers):
    text, forks = read_after(tokenizers["opens thoughts"], "hm</think>5?", "no")
    assert forks
    assert text.endswith("<user>assistant\n5?<eos>\n<user>user\nno<eos>\n<user>assistant\n<think>\n")


def test_a_later_turn_builds_on_what_was_read_in_earlier_ones(tokenizers):
    tokenizer = tokenizers["like ChatML"]
    conversation = Conversation(HELLO, tokenizer)
    conversation.go_on("1", "no")
    ids = conversation.continuation("2", "<eos>", "no again").token_ids.tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == "\n<user>user\nno again<eos>\n<user>assistant\n"


def test_an_observation_that_the_template_refuses_is_a_failure_of_the_environment(tmp_path):
    tokenizer = a_saved_tokenizer(tmp_path)
    with pytest.raises(EnvironmentFailure, match="environment_error: the observation cannot be rendered: no judges"):
        Conversation(HELLO, tokenizer).continuation("5", "<eos>", [{"role": "judge", "content": "no"}])


def test_chat_messages_after_a_text_are_a_failure_of_the_environment(tokenizers):
    with pytest.raises(EnvironmentFailure, match="chat messages came after a prompt that is a text"):
        Conversation("hello", tokenizers["like ChatML"]).continuation("5", "<eos>", HELLO)


def test_special_tokens_in_what_the_environment_says_do_not_end_up_in_sampled_ids(tokenizers):
    tokenizer = tokenizers["like ChatML"]
    ids = Conversation("hello", tokenizer).continuation("5", "<eos>", "a").token_ids
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "a"


# --- cutting ---------------------------------------------------------------------------------------------------------


def test_what_is_cut_keeps_beginning_and_end_and_says_how_much_is_missing():
    assert cut("0123456789", 4) == "01\n[... 6 characters left out ...]\n89"
    assert cut("0123456789", 5) == "012\n[... 5 characters left out ...]\n89"
    assert cut("0123456789", 0) == "\n[... 10 characters left out ...]\n"
    assert cut("0123456789", 10) == "0123456789"


def test_of_chat_messages_the_longest_text_is_cut():
    messages = [{"role": "user", "content": "short"}, {"role": "tool", "content": "much longer"}]
    assert longest_text(messages) == "much longer"
    assert replaced(messages, "much longer", "cut") == [messages[0], {"role": "tool", "content": "cut"}]
    assert longest_text([{"role": "user", "content": [{"type": "image"}]}]) == ""
