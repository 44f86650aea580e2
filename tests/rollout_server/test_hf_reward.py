"""A Hugging Face reward model in a worker process: its scores are those of a plain forward, whatever is beside them."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Phi3Config, Phi3ForSequenceClassification

from common.environments import EnvironmentSettings
from rollout_server.environments import environment_at
from rollout_server.environments.environment import (
    Environment,
    EnvironmentFailure,
    EnvironmentStartError,
    Said,
    parse_row,
)
from rollout_server.environments.reward_model import RewardModel
from tests.models import VOCAB_SIZE, save_tiny_model

MAX_TOKENS = 64
TEMPLATE = "{% for message in messages %}{{ 'w10 ' + message['content'] + ' <eos> ' }}{% endfor %}"

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A tiny one with random weights, and the tokenizer of the tests' models."""
    directory = tmp_path_factory.mktemp("reward-model")
    save_tiny_model(directory, tied=True)
    (directory / "model.safetensors").unlink()
    config = Phi3Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX_TOKENS, original_max_position_embeddings=MAX_TOKENS,
        num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Phi3ForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def environment(directory) -> AsyncIterator[Environment]:
    async with environment_at(f"hf-reward:{directory}", EnvironmentSettings(max_batch=8)) as environment:
        yield environment


async def reward_for(environment: Environment, completion: str, row: bytes = b'{"prompt": "w5 w6 "}') -> float:
    async with environment.episode(parse_row(row), seed=0) as episode:
        await episode.reset()
        return (await episode.step(Said(text=completion))).reward


@torch.no_grad()
def plain_score(directory: Path, text: str) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    ids = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")["input_ids"]
    return float(model(input_ids=ids).logits[0, 0])


async def test_a_text_is_scored_as_prompt_and_completion_in_one(environment, directory):
    assert await reward_for(environment, "w7 w8") == pytest.approx(plain_score(directory, "w5 w6 w7 w8"), abs=1e-5)


async def test_chat_messages_are_read_through_the_reward_models_own_template(environment, directory):
    row = b'{"prompt": [{"role": "system", "content": "w20"}, {"role": "user", "content": "w21"}]}'
    expected = plain_score(directory, "w10 w20 <eos> w10 w21 <eos> w10 w7 <eos>")
    assert await reward_for(environment, "w7", row) == pytest.approx(expected, abs=1e-5)


async def test_what_is_in_the_same_batch_changes_no_score(environment):
    completions = [" ".join(f"w{5 + (index * k) % 80}" for k in range(1 + index % 13)) for index in range(60)]
    alone = [await reward_for(environment, completion) for completion in completions[:20]]
    together = await asyncio.gather(*(reward_for(environment, completion) for completion in completions))
    assert together[:20] == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) > 30


async def test_a_text_that_is_too_long_fails_by_itself_and_is_not_cut(environment):
    with pytest.raises(EnvironmentFailure, match="72 tokens, the reward model reads 1 to 64") as caught:
        await reward_for(environment, " ".join(["w9"] * 70))
    assert caught.value.kind == "environment_error"
    assert isinstance(await reward_for(environment, "w9"), float)


async def test_a_call_that_is_given_up_takes_no_other_along(directory):
    model = RewardModel(str(directory), "8")
    row = {"prompt": "w5 w6 "}
    calls = [asyncio.ensure_future(model("w5 w6 ", f"w{index}", row)) for index in range(5, 11)]
    await calls[0]
    while model._waiting:  # until the second computes for all that are left
        await asyncio.sleep(0)
    calls[1].cancel()
    rewards = await asyncio.gather(*calls[2:])
    assert rewards == pytest.approx([plain_score(directory, f"w5 w6 w{index}") for index in range(7, 11)], abs=1e-5)


async def test_without_a_padding_token_each_text_goes_alone(directory, tmp_path):
    copy = Path(shutil.copytree(directory, tmp_path / "unpadded"))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    model = RewardModel(str(copy), "8")
    rewards = await asyncio.gather(*(model("", words, {"prompt": "w5 w6 "}) for words in ("w7", "w7 w8 w9")))
    expected = [plain_score(directory, words) for words in ("w7", "w7 w8 w9")]
    assert rewards == pytest.approx(expected, abs=1e-5)


def spoilt(directory: Path, target: Path, change: str) -> Path:
    copy = Path(shutil.copytree(directory, target))
    tensors = load_file(copy / "model.safetensors")
    if change == "nan":
        tensors["model.norm.weight"][0] = float("nan")
    elif change == "headless":
        del tensors["score.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


async def test_what_is_no_reward_model_is_refused_at_the_start_by_its_url_with_the_reason(tmp_path):
    url = f"hf-reward:{tmp_path}/nowhere"
    with pytest.raises(EnvironmentStartError) as caught:
        async with environment_at(url):
            raise AssertionError("entered")
    assert str(caught.value).startswith(
        f"environment {url} cannot be used: ValueError: there is no model {tmp_path}/nowhere"
    )


async def test_a_model_that_would_score_at_random_or_not_at_all_is_refused(directory, tmp_path):
    causal = save_tiny_model(tmp_path / "causal", tied=True)
    cases = {
        causal: f"{causal} has 2 labels; a reward model has one",
        spoilt(directory, tmp_path / "nan", "nan"): "model.norm.weight and 0 more tensors hold nan or inf",
        spoilt(directory, tmp_path / "headless", "headless"): "is no reward model: it has no score.weight",
    }
    for path, sentence in cases.items():
        with pytest.raises(ValueError, match=sentence):
            RewardModel(str(path), "8")


async def test_a_url_without_a_model_is_refused():
    with pytest.raises(ValueError, match="write hf-reward:NAME or hf-reward:DIRECTORY"):
        environment_at("hf-reward:")
