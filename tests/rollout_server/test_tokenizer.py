"""transformers' tokenizers fit the Tokenizer protocol: a real one, made here, saved and loaded."""

from pathlib import Path

import pytest

from common.fingerprint import fingerprint_tokenizer
from rollout_server.environments.environment import BadRow
from rollout_server.prompts import continuation_ids, prompt_ids
from rollout_server.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'judge' %}{{ raise_exception('no judges here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<policy>{% endif %}"
)
SPECIAL = ["<bos>", "<eos>", "<user>", "<policy>"]


def a_saved_tokenizer(directory: Path, *, chat_template: str | None = TEMPLATE) -> Tokenizer:
    """Bytes as tokens; puts <bos> before every text, as Llama's does."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=chat_template,
    )
    tokenizer.save_pretrained(directory)
    return load_tokenizer(str(directory))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return a_saved_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("text", ["12+3=", "<bos>12+3="])
def test_a_text_begins_with_one_bos(tokenizer, text):
    ids = prompt_ids(text, tokenizer).tolist()
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>12+3="
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12+3="


def test_a_chat_is_rendered_by_the_template_with_the_generation_prompt(tokenizer):
    ids = prompt_ids([{"role": "user", "content": "hé"}], tokenizer).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos><user>hé<policy>"
    assert ids[:2] == [0, 2]


def test_a_continuation_has_no_special_tokens(tokenizer):
    assert tokenizer.decode(continuation_ids("no\n", tokenizer).tolist(), skip_special_tokens=False) == "no\n"


def test_a_chat_that_the_template_refuses_is_a_bad_row_with_its_reason(tokenizer):
    with pytest.raises(BadRow, match="no judges here"):
        prompt_ids([{"role": "judge", "content": "a"}], tokenizer)


def test_the_fingerprint_survives_saving_and_tells_templates_apart(tokenizer, tmp_path):
    assert fingerprint_tokenizer(a_saved_tokenizer(tmp_path / "same")) == fingerprint_tokenizer(tokenizer)
    other = a_saved_tokenizer(tmp_path / "other", chat_template=None)
    assert fingerprint_tokenizer(other) != fingerprint_tokenizer(tokenizer)


def test_a_model_that_does_not_exist_is_an_error_that_names_it(tmp_path):
    with pytest.raises((OSError, ValueError), match="nowhere"):
        load_tokenizer(str(tmp_path / "nowhere"))
