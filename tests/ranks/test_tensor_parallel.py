"""Layers that real ranks have parts of, by AutoTP: what these make of a batch is what one rank on plain torch does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from learner.engine_settings import EngineSettings
from learner.reward_settings import KlSettings
from learner.torch_engine import open_torch_engine
from learner.training import TrainSettings
from tests.builders_learner import largest_difference, train, weights_of
from tests.models import a_model, save_model
from tests.ranks.pair import Pair, a_pair
from tests.ranks.rank_settings import SHARED, one_rank, settings_for

STEPS = 3
TOGETHER = EngineSettings(tensor_parallel=2)


@pytest.fixture(scope="module")
def splitting_pair() -> Iterator[Pair]:
    """Ranks of their own: DeepSpeed keeps who shares layers with whom for as long as a process lives."""
    with a_pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return str(save_model(tmp_path_factory.mktemp("models") / "wide", a_model(0, tied=True, **shape)))


def assert_as_on_one_rank(ranks: Pair, settings: TrainSettings, steps: int = STEPS) -> None:
    outcome = ranks.play(settings, steps=steps)
    weights, results = one_rank(settings, steps)
    for metrics, expected in zip(outcome.metrics, results, strict=True):
        assert metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)
    assert largest_difference(outcome.weights, weights) < 1e-6


@pytest.mark.slow
def test_split_layers_are_updated_published_and_checkpointed_as_whole_ones(
    wide_model: str, splitting_pair: Pair, tmp_path: Path
):
    settings = settings_for(wide_model, zero_stage=1, engine=TOGETHER)
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    outcome = splitting_pair.play(settings, steps=STEPS, save=str(saved), save_after=STEPS - 1, export=str(exported))
    weights, results = one_rank(settings_for(wide_model), STEPS)
    for metrics, expected in zip(outcome.metrics, results, strict=True):
        assert metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)
    assert largest_difference(outcome.weights, weights) < 1e-6
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert largest_difference(dict(model.named_parameters()), outcome.weights) == 0.0
    resumed = splitting_pair.play(settings_for(wide_model, engine=TOGETHER, seed=9), resume=str(saved), steps=1)
    assert largest_difference(resumed.weights, outcome.weights) == 0.0
    alone = open_torch_engine(settings_for(wide_model))
    alone.load(saved)
    alone.copy_state()(tmp_path / "alone")
    train(alone, steps=1, shared=SHARED)
    assert largest_difference(weights_of(alone), outcome.weights) < 1e-6
    split_again = splitting_pair.play(settings, resume=str(tmp_path / "alone"), steps=1)
    assert largest_difference(split_again.weights, outcome.weights) < 1e-6


RICHER: dict[str, dict[str, Any]] = {
    "padded, at stage 2": {"zero_stage": 2, "engine": EngineSettings(tensor_parallel=2, packing=False)},
    "a critic and entropy": {"advantage": "gae", "entropy_coefficient": 0.01},
    "a value head": {"advantage": "gae", "value_head": True},
    "a reference in the reward": {"kl": "reward"},
    "activations computed twice": {"engine": EngineSettings(tensor_parallel=2, activation_checkpointing=True)},
}


@pytest.mark.slow
@pytest.mark.parametrize("what", RICHER)
def test_whatever_is_trained_with_split_layers_is_trained_as_on_one_rank(
    what: str, wide_model: str, splitting_pair: Pair
):
    overrides: dict[str, Any] = {"engine": TOGETHER} | RICHER[what]
    if overrides.get("advantage") == "gae" and not overrides.get("value_head"):
        overrides["critic_model"] = wide_model
    if "kl" in overrides:
        overrides["kl"] = KlSettings(coefficient=0.1, place="reward", reference_model=wide_model)
    assert_as_on_one_rank(splitting_pair, settings_for(wide_model, **overrides))


@pytest.mark.slow
def test_norms_of_split_heads_get_the_gradient_of_all_of_them(splitting_pair: Pair, tmp_path: Path):
    """Qwen3's, of which every rank has the whole and computes a part of the gradient."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = str(save_model(tmp_path, a_model(0, tied=False, kind=Qwen3ForCausalLM, **shape)))
    assert_as_on_one_rank(splitting_pair, settings_for(model, engine=TOGETHER))


@pytest.mark.slow
def test_bfloat16_is_resumed_bit_for_bit_with_split_layers(wide_model: str, splitting_pair: Pair, tmp_path: Path):
    settings = settings_for(wide_model, zero_stage=2, dtype="bfloat16", engine=TOGETHER)
    outcome = splitting_pair.play(settings, steps=3, save=str(tmp_path), save_after=2)
    resumed = splitting_pair.play(settings, resume=str(tmp_path), steps=1)
    assert largest_difference(resumed.weights, outcome.weights) == 0.0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", [EngineSettings(sequence_parallel=2), TOGETHER])
def test_two_and_two_of_four_ranks_share_and_have_different_parts_of_a_batch(
    engine: EngineSettings, wide_model: str, tmp_path: Path
):
    settings = settings_for(wide_model, zero_stage=2, engine=engine)
    with a_pair(4) as ranks:
        outcome = ranks.play(settings, steps=STEPS, micro_batch_tokens=20, save=str(tmp_path), save_after=STEPS - 1)
        resumed = ranks.play(settings, resume=str(tmp_path), steps=1, micro_batch_tokens=20)
    assert (outcome.layout.num_parts, outcome.layout.ranks_per_part) == (2, 2)
    weights, _ = one_rank(settings, STEPS)
    assert largest_difference(outcome.weights, weights) < 1e-6
    assert largest_difference(resumed.weights, outcome.weights) == 0.0
