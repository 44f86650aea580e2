"""Two real ranks on DeepSpeed: what they make of a batch is what one rank on plain torch does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.lora_settings import LoraSettings, LoraSnapshots
from learner.reward_settings import KlSettings, RewardSettings
from learner.torch_engine import open_torch_engine
from tests.builders_learner import largest_difference, train, weights_of
from tests.models import save_tiny_model
from tests.ranks.pair import Pair
from tests.ranks.rank_settings import SHARED, one_rank, settings_for

STAGES = (0, 1, 2, 3)
STEPS = 3


@pytest.fixture(scope="module")
def alone(model: str) -> Any:
    return one_rank(settings_for(model), STEPS)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_update_as_one_rank_does_at_every_stage(stage: int, model: str, pair: Pair, alone: Any):
    outcome = pair.play(settings_for(model, zero_stage=stage), steps=STEPS)
    weights, results = alone
    assert largest_difference(outcome.weights, weights) < 1e-6
    for metrics, expected in zip(outcome.metrics, results, strict=True):
        assert metrics == pytest.approx(expected.metrics, rel=1e-4, abs=1e-5)
    assert (outcome.version, outcome.layout.packs, outcome.layout.shares_prompts) == (STEPS, True, True)


@pytest.mark.parametrize(
    ("stage", "micro_batch_tokens", "packing"), [(0, 10_000, False), (2, 13, True), (3, 64, False), (1, 10_000, True)]
)
def test_the_first_update_is_the_same_to_1e_6_however_a_batch_is_cut_and_packed(
    stage: int, micro_batch_tokens: int, packing: bool, model: str, pair: Pair
):
    settings = settings_for(model, warmup_steps=9, zero_stage=stage, engine=EngineSettings(packing=packing))
    outcome = pair.play(settings, steps=1, micro_batch_tokens=micro_batch_tokens)
    assert outcome.layout.packs == packing
    weights, _ = one_rank(settings, 1)
    assert largest_difference(outcome.weights, weights) < 1e-6
    start = weights_of(open_torch_engine(settings))
    assert largest_difference(weights, start) > 5e-5


def test_fewer_trajectories_than_ranks_need_are_trained_all_the_same(model: str, pair: Pair):
    outcome = pair.play(settings_for(model, zero_stage=3), steps=1, micro_batch_tokens=1, num_groups=1)
    assert outcome.refusals == [None]
    assert outcome.version == 1


RICHER = {
    "critic, normalised rewards, entropy": {
        "advantage": "gae",
        "entropy_coefficient": 0.01,
        "rewards": RewardSettings(normalization="running", clip=2.0),
    },
    "V-trace": {"advantage": "vtrace"},
    "a value head beside adapters": {"advantage": "gae", "value_head": True, "lora": LoraSettings(rank=4, alpha=8.0)},
    "V-trace with a value head": {"advantage": "vtrace", "value_head": True},
    "a loss over the whole batch": {"loss": "m2po"},
    "a reference with an adaptive coefficient": {"kl": "reward"},
    "dropped groups": {"rewards": RewardSettings(drop_truncated=True)},
    "activations computed twice": {"engine": EngineSettings(activation_checkpointing=True)},
}


@pytest.mark.parametrize("what", RICHER)
def test_what_looks_at_the_whole_batch_looks_at_both_ranks(what: str, model: str, pair: Pair, tmp_path: Path):
    overrides: dict[str, Any] = dict(RICHER[what])
    if overrides.get("advantage") in ("gae", "vtrace") and not overrides.get("value_head"):
        overrides["critic_model"] = model
    if "kl" in overrides:
        other = str(save_tiny_model(tmp_path / "other", seed=1, tied=True))
        overrides["kl"] = KlSettings(coefficient=0.1, place="reward", target=1.0, reference_model=other)
    settings = settings_for(model, zero_stage=3, **overrides)
    outcome = pair.play(settings, steps=2)
    weights, results = one_rank(settings, 2)
    for metrics, expected in zip(outcome.metrics, results, strict=True):
        assert metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)
    assert largest_difference(outcome.weights, weights) < 1e-6


@pytest.mark.parametrize(
    ("stage", "field"), [(1, "behavior_logprobs_BT"), (3, "behavior_logprobs_BT"), (2, "rewards_N")]
)
def test_a_loss_that_is_not_finite_on_one_rank_is_refused_on_both(stage: int, field: str, model: str, pair: Pair):
    start = weights_of(open_torch_engine(settings_for(model)))
    outcome = pair.play(settings_for(model, zero_stage=stage), steps=1, nan=field)
    [refusal] = outcome.refusals
    assert refusal is not None
    assert "is not finite" in refusal
    assert outcome.version == 0
    assert largest_difference(outcome.weights, start) == 0.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_on_one_rank_is_refused_on_both(stage: int, model: str, pair: Pair):
    start = weights_of(open_torch_engine(settings_for(model)))
    outcome = pair.play(settings_for(model, zero_stage=stage), steps=1, nan_in_backward_of_rank=1)
    [refusal] = outcome.refusals
    assert refusal is not None
    assert refusal.startswith("the gradient of ")
    assert largest_difference(outcome.weights, start) == 0.0


def test_bfloat16_keeps_float32_masters_at_every_stage_and_publishes_their_rounding(
    model: str, pair: Pair, tmp_path: Path
):
    expected, _ = one_rank(settings_for(model), STEPS)
    start = weights_of(open_torch_engine(settings_for(model)))
    for stage in (1, 2, 3):
        settings = settings_for(model, zero_stage=stage, dtype="bfloat16")
        outcome = pair.play(settings, steps=STEPS, save=str(tmp_path / str(stage)), save_after=STEPS - 1)
        assert {tensor.dtype for tensor in outcome.weights.values()} == {torch.bfloat16}
        resumed = pair.play(settings, resume=str(tmp_path / str(stage)), steps=1)
        assert largest_difference(resumed.weights, outcome.weights) == 0.0
        moved = torch.cat([(expected[name] - start[name]).flatten() for name in expected])
        error = torch.cat([(outcome.weights[name].float() - expected[name]).flatten() for name in expected])
        assert (
            error.abs().mean() < 2 * moved.abs().mean()
        )  # of a step that is smaller than the rounding of most weights


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_written_beside_the_next_step_is_resumed_bit_for_bit(
    stage: int, model: str, pair: Pair, tmp_path: Path
):
    settings = settings_for(model, zero_stage=stage)
    directory = str(tmp_path / "checkpoint")
    unbroken = pair.play(settings, steps=4, save=directory, save_after=2)
    resumed = pair.play(settings_for(model, zero_stage=stage, seed=9), resume=directory, steps=2)
    assert (unbroken.version, resumed.version) == (4, 4)
    assert largest_difference(resumed.weights, unbroken.weights) == 0.0


@pytest.mark.parametrize(("before", "after"), [(3, 0), (0, 3), (1, 2), (2, 1)])
def test_a_checkpoint_is_resumed_at_another_stage_and_number_of_ranks(
    before: int, after: int, model: str, pair: Pair, tmp_path: Path
):
    directory = tmp_path / "two-ranks"
    unbroken = pair.play(settings_for(model, zero_stage=before), steps=4, save=str(directory), save_after=2)
    other_stage = pair.play(settings_for(model, zero_stage=after), resume=str(directory), steps=2)
    assert largest_difference(other_stage.weights, unbroken.weights) < 1e-6
    one = open_torch_engine(settings_for(model))
    one.load(directory)
    one.copy_state()(tmp_path / "one-rank")
    train(one, steps=2, shared=SHARED)
    assert largest_difference(weights_of(one), unbroken.weights) < 1e-6
    grown = pair.play(settings_for(model, zero_stage=before), resume=str(tmp_path / "one-rank"), steps=2)
    assert largest_difference(grown.weights, unbroken.weights) == 0.0


@pytest.mark.parametrize(("stage", "snapshots"), [(1, "merged"), (3, "adapter")])
def test_adapters_alone_are_shared_out_and_published_merged_or_beside_their_base_model(
    stage: int, snapshots: LoraSnapshots, model: str, pair: Pair, tmp_path: Path
):
    kl, lora = KlSettings(coefficient=0.1, reference_model=model), LoraSettings(rank=4, alpha=8.0)
    settings = settings_for(model, zero_stage=stage, lora=lora, lora_snapshots=snapshots, kl=kl)
    outcome = pair.play(settings, steps=STEPS, save=str(tmp_path / "saved"), save_after=STEPS - 1)
    weights, results = one_rank(settings, STEPS)
    for metrics, expected in zip(outcome.metrics, results, strict=True):
        assert metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)
    assert largest_difference(outcome.weights, weights) < 1e-6
    resumed = pair.play(settings, resume=str(tmp_path / "saved"), steps=1)
    assert largest_difference(resumed.weights, outcome.weights) == 0.0


@pytest.mark.parametrize(("stage", "lora"), [(1, None), (3, None), (3, LoraSettings(rank=4, alpha=8.0))])
def test_an_export_is_what_was_published(stage: int, lora: LoraSettings | None, model: str, pair: Pair, tmp_path: Path):
    settings = settings_for(model, zero_stage=stage, lora=lora, lora_snapshots="merged")
    outcome = pair.play(settings, steps=1, export=str(tmp_path / "exported"))
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert largest_difference(dict(exported.named_parameters()), outcome.weights) == 0.0
    assert (tmp_path / "exported" / "tokenizer.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)  # DeepSpeed's Adam for host memory is compiled once, by each rank that comes first
@pytest.mark.parametrize(("stage", "offload"), [(2, "optimizer"), (3, "optimizer"), (3, "all")])
def test_what_is_offloaded_to_host_memory_is_trained_and_resumed_alike(
    stage: int, offload: Any, model: str, pair: Pair, alone: Any, tmp_path: Path
):
    settings = settings_for(model, zero_stage=stage, engine=EngineSettings(offload=offload))
    outcome = pair.play(settings, steps=STEPS, save=str(tmp_path / "saved"), save_after=STEPS - 1, patience_s=400.0)
    weights, _ = alone
    assert largest_difference(outcome.weights, weights) < 1e-6
    resumed = pair.play(settings, resume=str(tmp_path / "saved"), steps=1)
    assert largest_difference(resumed.weights, outcome.weights) == 0.0


def test_a_checkpoint_without_the_part_of_one_rank_is_refused_on_all(model: str, pair: Pair, tmp_path: Path):
    pair.play(settings_for(model, zero_stage=2), steps=2, save=str(tmp_path), save_after=1)
    (tmp_path / "policy" / "rank-00001.safetensors").unlink()
    with pytest.raises(UserError, match="was written by 2 ranks and has 1"):
        open_torch_engine(settings_for(model)).load(tmp_path)
