import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from learner.demo import model as demo
from learner.demo.task import NUM_DIGITS, training_prompts


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "model"
    demo.build_demo_model(path, seed=3)
    return path


def test_the_tokenizer_takes_one_token_a_character_and_gives_the_text_back(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.encode("3142=3142")
    assert len(ids) == 9
    assert tokenizer.decode(ids) == "3142=3142"
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "3142=3142"
    assert len(set(tokenizer.encode("0123456789="))) == 11
    assert len(tokenizer) <= demo.VOCAB_SIZE


@torch.no_grad()
def test_the_warm_start_taught_the_shape_of_an_answer_but_not_the_answer(directory):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    digits = torch.tensor(tokenizer.encode("0123456789"))
    rows = list(training_prompts())[::100]
    ids = torch.tensor([tokenizer.encode(row["prompt"] + row["answer"]) for row in rows])
    probabilities = model(ids).logits[:, NUM_DIGITS:].softmax(-1)
    assert probabilities[:, :NUM_DIGITS, digits].sum(-1).mean() > 0.6  # untrained: 10/64
    assert probabilities[:, NUM_DIGITS, tokenizer.eos_token_id].mean() > 0.5
    right = probabilities[:, :NUM_DIGITS].gather(2, ids[:, NUM_DIGITS + 1 :, None])
    assert right.mean() < 0.5


def test_the_same_seed_makes_the_same_model_and_another_another(directory, tmp_path, monkeypatch):
    demo.build_demo_model(tmp_path / "same", seed=3)
    monkeypatch.setattr(demo, "WARM_START_STEPS", 1)
    demo.build_demo_model(tmp_path / "other", seed=4)
    first, same, other = (
        AutoModelForCausalLM.from_pretrained(path).lm_head.weight
        for path in (directory, tmp_path / "same", tmp_path / "other")
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
