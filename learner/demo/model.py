"""The demo model: a 0.3M parameter Qwen2 over characters, warm-started just enough to answer in the right shape."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

from learner.demo.task import NUM_DIGITS, training_prompts

transformers_logging.disable_progress_bar()
logger = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<eos>", "<unk>")
CHARACTERS = "0123456789=+-*/() abcdefghijklmnopqrstuvwxyz.,:;?!"
VOCAB_SIZE = 64
MAX_MODEL_LEN = 512  # prompt and completion: room for the learner's default of max_new_tokens

WARM_START_STEPS = 25
WARM_START_BATCH = 64


def build_demo_model(directory: Path, *, seed: int = 0) -> None:
    """Writes a Hugging Face model directory that transformers and vLLM load. Takes a few seconds."""
    started_s = time.monotonic()
    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(_config(tokenizer))
    loss = _warm_start(model, tokenizer, seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    logger.info(
        "made the demo model in %s: %d steps of supervised warm start in %.1f s, loss %.2f",
        directory,
        WARM_START_STEPS,
        time.monotonic() - started_s,
        loss,
    )


def save_tokenizer(directory: Path) -> None:
    """The demo's tokenizer alone, for other models over the same characters."""
    _tokenizer().save_pretrained(directory)


def _tokenizer() -> PreTrainedTokenizerFast:
    vocab = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    characters = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_MODEL_LEN,
    )


def _config(tokenizer: PreTrainedTokenizerFast) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_MODEL_LEN,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _warm_start(model: Any, tokenizer: PreTrainedTokenizerFast, seed: int) -> float:
    """Supervised, on training prompts alone, and deliberately too short. Returns the last loss."""
    rows = list(training_prompts())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    loss = torch.tensor(0.0)
    for _ in range(WARM_START_STEPS):
        chosen = [rows[i] for i in torch.randint(len(rows), (WARM_START_BATCH,), generator=generator)]
        ids_BT = torch.tensor([tokenizer.encode(f"{row['prompt']}{row['answer']}<eos>") for row in chosen])
        labels_BT = ids_BT.clone()
        labels_BT[:, : NUM_DIGITS + 1] = -100  # the prompt is given, not learned
        loss = model(input_ids=ids_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())
