import pytest

from common.fingerprint import fingerprint_tokenizer
from rollout_server.environments.environment import BadRow
from rollout_server.prompts import continuation_ids, prompt_ids
from tests.rollout_server.tokenizer_twin import BOS_ID, CharacterTokenizer

TOKENIZER = CharacterTokenizer()


def test_a_text_gets_the_special_tokens_of_the_tokenizer_once():
    assert prompt_ids("ab", TOKENIZER).tolist() == TOKENIZER.encode("<bos>ab", add_special_tokens=False)
    assert prompt_ids("<bos>ab", TOKENIZER).tolist() == TOKENIZER.encode("<bos>ab", add_special_tokens=False)


def test_a_chat_gets_those_of_its_template_once():
    ids = prompt_ids([{"role": "user", "content": "ab"}], TOKENIZER).tolist()
    assert ids == TOKENIZER.encode("<bos><user>ab<policy>", add_special_tokens=False)
    assert ids.count(BOS_ID) == 1


def test_a_continuation_gets_none():
    assert continuation_ids("ab", TOKENIZER).tolist() == TOKENIZER.encode("ab", add_special_tokens=False)
    assert continuation_ids("", TOKENIZER).size == 0


def test_a_chat_without_a_template_is_an_error_that_says_what_to_do():
    with pytest.raises(BadRow, match="no chat template; give a text"):
        prompt_ids([{"role": "user", "content": "ab"}], CharacterTokenizer(chat_template=None))


def test_the_fingerprint_is_that_of_vocabulary_and_chat_template():
    assert fingerprint_tokenizer(TOKENIZER) == fingerprint_tokenizer(CharacterTokenizer())
    assert fingerprint_tokenizer(TOKENIZER) != fingerprint_tokenizer(CharacterTokenizer(chat_template=None))
