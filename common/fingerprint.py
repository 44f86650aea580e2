"""Fingerprints: two processes hold the same model and the same tokenizer when these short texts are equal."""

import json
from collections.abc import Mapping
from typing import Any, Protocol

import xxhash

MODEL_CONFIG_KEYS = frozenset(
    [
        *["architectures", "model_type", "vocab_size", "tie_word_embeddings"],
        *["hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act"],
        *["num_attention_heads", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "qk_norm"],
        *["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"],
        *["max_position_embeddings", "partial_rotary_factor", "sliding_window", "layer_types"],
        *["num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"],
        *["n_embd", "n_layer", "n_head", "n_inner", "n_positions", "activation_function"],
    ]
)
"""What decides the function a checkpoint's tensors compute, by the names of Hugging Face configurations."""


def fingerprint_vocabulary(
    vocab: Mapping[str, int], special: Mapping[str, int | None], chat_template: str | None
) -> str:
    """Of token -> id, role ("eos", ...) -> id and chat template: what ids mean and how prompts are made of them."""
    return _digest([sorted(vocab.items()), _normal(special), chat_template])


class TokenizerFacts(Protocol):
    """The part of a tokenizer that decides what ids mean; transformers' tokenizers fit as they are."""

    chat_template: str | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def get_vocab(self) -> Mapping[str, int]: ...


def fingerprint_tokenizer(tokenizer: TokenizerFacts) -> str:
    """Equal on learner and server exactly when they give ids the same meaning and render chats alike."""
    special = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return fingerprint_vocabulary(tokenizer.get_vocab(), special, tokenizer.chat_template)


def fingerprint_model_config(config: Mapping[str, Any]) -> str:
    """Of a Hugging Face configuration as a dict (`AutoConfig...to_dict()`): the architecture, not the bookkeeping.

    Older and newer spellings of the same architecture (rope, defaults written out or not) give the same fingerprint.
    """
    return _digest(_architecture(config))


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: value for key, value in config.items() if key in MODEL_CONFIG_KEYS}
    heads = known.get("num_attention_heads")
    if heads:
        if known.get("num_key_value_heads") is None:
            known["num_key_value_heads"] = heads
        if known.get("head_dim") is None and "hidden_size" in known:
            known["head_dim"] = known["hidden_size"] // heads
    known["rope"] = _rope(config)
    if isinstance(text_config := config.get("text_config"), Mapping):
        known["text_config"] = _architecture(text_config)
    return {key: _normal(value) for key, value in known.items() if value is not None}


def _rope(config: Mapping[str, Any]) -> dict[str, Any] | None:
    rope: dict[str, Any] = {"rope_theta": config.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        rope |= config.get(key) or {}
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    return rope if rope["rope_theta"] is not None or len(rope) > 2 else None


def _normal(value: Any) -> Any:
    """10000.0 and 10000 are one number, a tuple and a list one sequence, None and absent one thing."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, Mapping):
        return {str(key): _normal(each) for key, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_normal(each) for each in value]
    return value


def _digest(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii"))
