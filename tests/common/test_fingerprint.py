from typing import Any

import pytest

from common.fingerprint import fingerprint_model_config, fingerprint_vocabulary

VOCAB = {"a": 0, "b": 1, "\ud800": 2}
SPECIAL = {"eos": 1, "bos": None}
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}


def test_fingerprints_do_not_depend_on_the_order_or_the_process():
    assert fingerprint_vocabulary(VOCAB, SPECIAL, None) == "e0599724fcd238d18ab70d9969ce3765"
    assert fingerprint_vocabulary(dict(reversed(VOCAB.items())), {"eos": 1}, None) == "e0599724fcd238d18ab70d9969ce3765"
    assert fingerprint_model_config(CONFIG) == "c6ea84f54b1a1516a35cb531276095f5"
    assert fingerprint_model_config(dict(reversed(CONFIG.items()))) == "c6ea84f54b1a1516a35cb531276095f5"


@pytest.mark.parametrize(
    ("vocab", "special", "chat_template"),
    [
        ({"a": 0, "b": 1}, SPECIAL, None),
        ({"a": 1, "b": 0, "\ud800": 2}, SPECIAL, None),
        (VOCAB, {"eos": 0, "bos": None}, None),
        (VOCAB, {"eos": None, "bos": 1}, None),
        (VOCAB, SPECIAL, ""),
    ],
)
def test_another_vocabulary_special_token_or_template_is_another_fingerprint(vocab, special, chat_template):
    assert fingerprint_vocabulary(vocab, special, chat_template) != fingerprint_vocabulary(VOCAB, SPECIAL, None)


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": ["LlamaForCausalLM"]},
        {"hidden_size": 129},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 4},
        {"head_dim": 64},
        {"vocab_size": 65},
        {"tie_word_embeddings": False},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 500000.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"text_config": {"hidden_size": 64}},
    ],
)
def test_another_architecture_is_another_fingerprint(change):
    assert fingerprint_model_config(CONFIG | change) != fingerprint_model_config(CONFIG)


@pytest.mark.parametrize(
    "change",
    [
        {"transformers_version": "5.19.0", "_name_or_path": "elsewhere", "dtype": "bfloat16", "use_cache": False},
        {"rope_theta": 10000},
        {"head_dim": 32},
        {"head_dim": None, "sliding_window": None},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"architectures": ("Qwen2ForCausalLM",)},
    ],
)
def test_bookkeeping_and_other_spellings_of_the_same_architecture_change_nothing(change):
    assert fingerprint_model_config(CONFIG | change) == fingerprint_model_config(CONFIG)
