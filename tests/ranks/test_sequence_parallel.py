"""Sequences that two real ranks compute together: what they make of a batch is what one rank on plain torch does."""

from pathlib import Path
from typing import Any

import pytest
from transformers import FalconConfig, FalconForCausalLM, LlamaConfig, LlamaForCausalLM

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.lora_settings import LoraSettings
from learner.reward_settings import KlSettings
from tests.builders_learner import largest_difference
from tests.models import VOCAB_SIZE, a_model, save_model, save_tiny_model
from tests.ranks.pair import Pair
from tests.ranks.rank_settings import one_rank, settings_for

STEPS = 2
TOGETHER = EngineSettings(sequence_parallel=2)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With more heads of keys than ranks."""
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 128}
    return str(save_model(tmp_path_factory.mktemp("models") / "wide", a_model(0, tied=False, **shape)))


def assert_as_on_one_rank(pair: Pair, settings: Any, **fields: Any) -> None:
    outcome = pair.play(settings, steps=STEPS, **fields)
    weights, results = one_rank(settings, STEPS)
    for metrics, expected in zip(outcome.metrics, results, strict=True):
        assert metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)
    assert largest_difference(outcome.weights, weights) < 1e-6


@pytest.mark.parametrize(("stage", "packing"), [(0, True), (1, False), (2, True), (3, True)])
def test_a_batch_gives_the_same_update_at_every_stage_packed_and_padded(
    stage: int, packing: bool, model: str, pair: Pair
):
    engine = EngineSettings(sequence_parallel=2, packing=packing)
    assert_as_on_one_rank(pair, settings_for(model, zero_stage=stage, engine=engine))


def test_heads_of_keys_that_are_as_many_as_ranks_or_more_are_shared_out(wide_model: str, pair: Pair):
    assert_as_on_one_rank(pair, settings_for(wide_model, zero_stage=1, engine=TOGETHER))


RICHER: dict[str, dict[str, Any]] = {
    "a critic and entropy": {"advantage": "gae", "entropy_coefficient": 0.01},
    "a value head beside adapters": {"advantage": "gae", "value_head": True, "lora": LoraSettings(rank=4, alpha=8.0)},
    "a loss over sequences": {"loss": "gspo"},
    "a loss over the whole batch": {"loss": "m2po"},
    "a reference in the reward": {"kl": "reward"},
    "activations computed twice": {"engine": EngineSettings(sequence_parallel=2, activation_checkpointing=True)},
}
SLOW = {"a value head beside adapters", "a loss over the whole batch", "a reference in the reward"}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=pytest.mark.slow) if what in SLOW else what for what in RICHER]
)
def test_whatever_looks_at_a_sequence_sees_all_of_it(what: str, model: str, pair: Pair, tmp_path: Path):
    overrides: dict[str, Any] = {"engine": TOGETHER} | RICHER[what]
    if overrides.get("advantage") == "gae" and not overrides.get("value_head"):
        overrides["critic_model"] = model
    if "kl" in overrides:
        other = str(save_tiny_model(tmp_path / "other", seed=1, tied=True))
        overrides["kl"] = KlSettings(coefficient=0.1, place="reward", target=1.0, reference_model=other)
    assert_as_on_one_rank(pair, settings_for(model, zero_stage=3, **overrides))


def test_ranks_compute_together_twice_the_tokens_that_one_would(model: str, pair: Pair):
    settings = settings_for(model, zero_stage=1, engine=TOGETHER)
    apart = pair.play(settings_for(model, zero_stage=1), steps=1, micro_batch_tokens=20)
    together = pair.play(settings, steps=1, micro_batch_tokens=20)
    assert (apart.layout.num_parts, apart.layout.ranks_per_part) == (2, 1)
    assert (together.layout.num_parts, together.layout.ranks_per_part) == (1, 2)
    assert largest_difference(apart.weights, together.weights) < 1e-6


def test_a_checkpoint_is_resumed_with_sequences_apart_and_together(model: str, pair: Pair, tmp_path: Path):
    together, apart = settings_for(model, zero_stage=2, engine=TOGETHER), settings_for(model, zero_stage=2)
    unbroken = pair.play(together, steps=3, save=str(tmp_path), save_after=2)
    for settings in (together, apart):
        resumed = pair.play(settings, resume=str(tmp_path), steps=1)
        assert largest_difference(resumed.weights, unbroken.weights) < 1e-6


def test_what_is_not_finite_is_refused_with_the_place_of_its_micro_batch(model: str, pair: Pair):
    settings = settings_for(model, zero_stage=1, engine=TOGETHER)
    for fields in ({"nan": "behavior_logprobs_BT"}, {"nan_in_backward_of_rank": 1}):
        outcome = pair.play(settings, steps=1, micro_batch_tokens=30, **fields)
        [refusal] = outcome.refusals
        assert refusal is not None
        assert refusal.endswith("is not finite") or refusal.startswith("the gradient of ")
        assert outcome.version == 0


def test_what_cannot_be_shared_is_refused_on_all_ranks_with_what_to_set(model: str, pair: Pair):
    for engine, reason in [
        (EngineSettings(sequence_parallel=3), r"--sequence-parallel 3 needs a number of ranks that is a multiple of 3"),
        (EngineSettings(sequence_parallel=2, attention="eager"), r"needs --attention sdpa or flash_attention_2"),
    ]:
        with pytest.raises(UserError, match=reason):
            pair.play(settings_for(model, engine=engine), steps=1)


def test_models_that_would_say_something_else_are_refused_on_all_ranks(model: str, pair: Pair, tmp_path: Path):
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    FalconForCausalLM(FalconConfig(**sizes)).save_pretrained(tmp_path / "falcon")  # its attention asks nobody
    with pytest.raises(UserError, match="FalconModel says something else of sequences that are spread over ranks"):
        pair.play(settings_for(str(tmp_path / "falcon"), engine=TOGETHER), steps=1)
    LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=32)).save_pretrained(tmp_path / "llama")
    kl = KlSettings(coefficient=0.1, reference_model=str(tmp_path / "llama"))
    with pytest.raises(UserError, match="llama is a llama, the policy a qwen2"):
        pair.play(settings_for(model, engine=TOGETHER, kl=kl), steps=1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_long_sequences_in_bfloat16_are_trained_as_on_one_rank_each(tmp_path: Path, pair: Pair):
    """Of a thousand tokens each, so that a rank's stretch begins far into a sequence."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128, "num_hidden_layers": 3}
    model = str(save_model(tmp_path, a_model(0, tied=True, **shape)))
    fields = {"steps": 1, "num_groups": 1, "sampled_tokens": 990, "micro_batch_tokens": 1000}
    for dtype, tolerance in (("float32", 1e-6), ("bfloat16", 4e-3)):  # the second is what a weight is rounded by
        together, apart = (
            pair.play(settings_for(model, zero_stage=3, dtype=dtype, engine=engine), **fields)
            for engine in (TOGETHER, EngineSettings())
        )
        assert largest_difference(together.weights, apart.weights) < tolerance
