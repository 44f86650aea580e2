"""Tiny Qwen2 models for tests: built in milliseconds, and judged by a transformers forward in float32."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from common.snapshot import SnapshotManifest, TensorSpec, build_manifest

VOCAB_SIZE = 96
TOKENIZER_EOS_ID, GENERATION_EOS_ID, CONFIG_EOS_ID = END_IDS = (2, 3, 4)  # each is named in one file of the model
FIRST_WORD_ID = 5
LOGIT_SPREAD = 6.0


def a_tiny_model(seed: int, *, tied: bool, dtype: torch.dtype = torch.float32) -> Qwen2ForCausalLM:
    """Random weights, large enough that the next-token distribution depends on all of them and is not flat."""
    return a_model(seed, tied=tied, dtype=dtype)


def a_model(
    seed: int, *, tied: bool, dtype: torch.dtype = torch.float32, kind: Any = Qwen2ForCausalLM, **shape: int
) -> Qwen2ForCausalLM:
    """Likewise, of whatever shape and architecture."""
    shape = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,  # vLLM's CPU attention takes heads of 32, 64, ... dimensions
        "num_key_value_heads": 1,
    } | shape
    config = kind.config_class(
        **shape,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=CONFIG_EOS_ID,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        for name, parameter in model.named_parameters():
            spread = 0.5 if "layernorm" in name or "norm" in name else LOGIT_SPREAD / parameter.shape[-1] ** 0.5
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=spread / 4)
        # Their logits are 0: completions do end, but in hundreds of tokens and not in dozens.
        model.get_output_embeddings().weight.data[list(END_IDS)] = 0.0
    return model.to(dtype).eval()


class MixesRowsUp(Qwen2Model):
    """Looks at no positions: each token of a row sees all before it."""

    def forward(self, *, position_ids: Any = None, **inputs: Any) -> Any:
        return super().forward(**inputs)


def a_model_that_mixes_rows_up() -> Qwen2Model:
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5,
    )  # fmt: skip
    return MixesRowsUp(config).eval()


def save_tiny_model(directory: Path, *, seed: int = 0, tied: bool, dtype: torch.dtype = torch.float32) -> Path:
    """A model directory as Hugging Face lays it out, with a tokenizer of one token per word `w<id>`."""
    return save_model(directory, a_tiny_model(seed, tied=tied, dtype=dtype))


def save_model(directory: Path, model: Qwen2ForCausalLM) -> Path:
    model.generation_config.eos_token_id = [TOKENIZER_EOS_ID, GENERATION_EOS_ID]
    model.generation_config.update(do_sample=True, top_p=0.3, top_k=4, temperature=0.5, repetition_penalty=1.7)
    model.save_pretrained(directory)
    vocab = {"<pad>": 0, "<unk>": 1, "<eos>": TOKENIZER_EOS_ID} | {
        f"w{i}": i for i in range(GENERATION_EOS_ID, VOCAB_SIZE)
    }
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)
    return directory


def snapshot_bytes(model: torch.nn.Module) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """The parameters of a model as one byte string, and where each of them lies in it."""
    tensors: list[TensorSpec] = []
    chunks: list[bytes] = []
    end = 0
    for name, parameter in model.named_parameters():
        dtype = str(parameter.dtype).removeprefix("torch.")
        tensors.append(TensorSpec(name=name, shape=tuple(parameter.shape), dtype=dtype, offset=end))  # type: ignore[arg-type]
        chunks.append(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        end += len(chunks[-1])
    return b"".join(chunks), tuple(tensors)


def write_snapshot(path: Path, model: torch.nn.Module, *, version: int) -> SnapshotManifest:
    """Write a model's parameters to a file, as a learner publishes them."""
    data, tensors = snapshot_bytes(model)
    path.write_bytes(data)
    return build_manifest(memoryview(data), tensors, run_id="test", version=version)


@torch.no_grad()
def forward_logprobs(model: torch.nn.Module, token_ids: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """log pi of tokens 1..T-1 of token_ids [T] given those before, by transformers in float32: [T-1]."""
    ids_1T = torch.from_numpy(token_ids.astype(np.int64))[None]
    logits_TV = model(ids_1T).logits[0].float() / temperature
    logprobs_TV = torch.log_softmax(logits_TV[:-1], dim=-1)
    return logprobs_TV.gather(1, ids_1T[0, 1:, None])[:, 0].numpy()
