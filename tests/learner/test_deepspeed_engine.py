"""DeepSpeed against its plain torch twin: same batches, same steps, same weights."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.lifecycle import UserError
from learner.deepspeed_engine import open_deepspeed_engine
from learner.engine_settings import EngineSettings
from learner.launch import launched_place
from learner.ppo_engine import PpoEngine
from learner.reward_settings import KlSettings, RewardSettings
from learner.torch_engine import open_torch_engine
from learner.training import StepResult, TrainSettings
from tests.builders_learner import (
    BREAKS,
    a_batch,
    a_group,
    a_trajectory,
    largest_difference,
    random_groups,
    refuse_a_batch,
    some_train_settings,
    train,
    weights_of,
    with_nan,
)
from tests.models import forward_logprobs, save_tiny_model

STEPS = 3
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")


@pytest.fixture(scope="module", autouse=True)
def _environment():
    """DeepSpeed reads the launcher's variables from the environment; the tests after these get theirs back."""
    before = dict(os.environ)
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


@pytest.fixture(scope="module")
def twin(model) -> tuple[PpoEngine, list[StepResult]]:
    engine = open_torch_engine(some_train_settings(model))
    return engine, train(engine, steps=STEPS)


def critic_weights(engine: PpoEngine) -> dict[str, torch.Tensor]:
    assert engine._critic is not None
    return {name: each.detach().clone() for name, each in engine._critic.module.named_parameters()}


def assert_close_metrics(results: list[StepResult], expected: list[StepResult], tolerance: float = 1e-4) -> None:
    for one, other in zip(results, expected, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=tolerance, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_float32_deepspeed_equals_plain_torch(stage, model, twin):
    engine = open_deepspeed_engine(some_train_settings(model, zero_stage=stage))
    start = weights_of(engine)
    results = train(engine, steps=STEPS)
    expected_engine, expected_results = twin
    # Adam divides by the gradient's own size, so that the rounding of a tiny gradient becomes visible.
    moved = largest_difference(weights_of(engine), start)
    assert largest_difference(weights_of(engine), weights_of(expected_engine)) < 2e-3 * moved
    assert_close_metrics(results, expected_results)
    assert results[0].metrics["grad_norm"] > 0.5  # so that it was clipped
    assert engine.version == STEPS
    prompt = np.arange(5, 40, dtype=np.int32)
    np.testing.assert_allclose(
        engine.token_logprobs(prompt), forward_logprobs(engine._network.model, prompt), atol=1e-5
    )


def test_a_learner_of_one_rank_makes_no_ranks_of_the_processes_that_it_starts(model):
    open_deepspeed_engine(some_train_settings(model))
    assert launched_place(os.environ) is None


def test_bfloat16_at_stage_1_stays_close_to_float32(model):
    gentle = some_train_settings(model, learning_rate=1e-3)
    engine = open_deepspeed_engine(replace(gentle, dtype="bfloat16", zero_stage=1))
    expected = open_torch_engine(gentle)
    start = weights_of(expected)
    results, expected_results = train(engine, steps=STEPS), train(expected, steps=STEPS)
    assert {tensor.dtype for tensor in weights_of(engine).values()} == {torch.bfloat16}
    moved = largest_difference(weights_of(expected), start)
    mean_difference = torch.cat(
        [(weights_of(engine)[name].float() - tensor).abs().flatten() for name, tensor in weights_of(expected).items()]
    ).mean()
    assert mean_difference < 0.5 * moved
    for one, other in zip(results, expected_results, strict=True):
        for name in ("loss", "entropy", "grad_norm", "ratio_mean"):
            assert one.metrics[name] == pytest.approx(other.metrics[name], rel=0.1, abs=0.03), name


def gae_settings(model: str, **overrides) -> TrainSettings:
    return some_train_settings(
        model,
        learning_rate=1e-3,  # Adam turns rounding errors of tiny gradients into errors of the size of a step
        adam_epsilon=1e-6,
        critic_learning_rate=3e-3,
        critic_model=model,
        advantage="gae",
        advantage_settings={"gamma": 0.9, "gae_lambda": 0.8},
        **overrides,
    )


def test_a_reference_and_shaped_rewards_on_deepspeed_equal_those_on_plain_torch(model, tmp_path):
    other = str(save_tiny_model(tmp_path / "other", seed=1, tied=True))
    settings = some_train_settings(
        model,
        learning_rate=1e-3,
        advantage="reinforce_plus_plus",
        kl=KlSettings(coefficient=0.1, place="reward", target=1.0, reference_model=other, reference_offload=True),
        rewards=RewardSettings(normalization="running", clip=2.0),
    )
    engine, twin = open_deepspeed_engine(settings), open_torch_engine(settings)
    train(engine, steps=1)
    engine.copy_state()(tmp_path)
    assert_close_metrics(train(engine, steps=2), train(twin, steps=3)[1:])
    resumed = open_deepspeed_engine(settings)
    resumed.load(tmp_path)
    train(resumed, steps=2)
    assert largest_difference(weights_of(resumed), weights_of(engine)) == 0.0


@pytest.fixture(scope="module")
def checkpoint_after_two_steps(model, tmp_path_factory) -> tuple[Path, PpoEngine, list[StepResult]]:
    """Policy and critic, stage 1: the checkpoint, and what became of the engine in two more steps."""
    engine = open_deepspeed_engine(gae_settings(model, zero_stage=1))
    train(engine, steps=2)
    directory = tmp_path_factory.mktemp("checkpoints") / "two"
    directory.mkdir()
    engine.copy_state()(directory)
    return directory, engine, train(engine, steps=2)


def test_a_critic_that_warms_up_on_deepspeed_equals_one_on_plain_torch(model):
    settings = gae_settings(model, critic_warmup_steps=1, engine=EngineSettings(packing=False))  # as the other has it
    engine, expected = open_deepspeed_engine(settings), open_torch_engine(settings)
    start = weights_of(engine)
    results, expected_results = train(engine, steps=1), train(expected, steps=1)
    assert largest_difference(weights_of(engine), start) == 0.0
    results, expected_results = results + train(engine, steps=1), expected_results + train(expected, steps=1)
    moved = largest_difference(weights_of(engine), start)
    assert largest_difference(weights_of(engine), weights_of(expected)) < 2e-3 * moved
    assert_close_metrics(results, expected_results)


def test_a_critic_on_deepspeed_equals_one_on_plain_torch(checkpoint_after_two_steps, model):
    _, engine, results = checkpoint_after_two_steps
    twin = open_torch_engine(gae_settings(model))
    assert_close_metrics(results, train(twin, steps=4)[2:])
    assert largest_difference(weights_of(engine), weights_of(twin)) < 1e-5
    assert largest_difference(critic_weights(engine), critic_weights(twin)) < 1e-5


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_value_head_on_deepspeed_equals_one_on_plain_torch_and_resumes(stage, model, tmp_path):
    settings = some_train_settings(
        model,
        learning_rate=1e-3,
        adam_epsilon=1e-6,  # else Adam turns rounding errors of tiny gradients into errors of the size of a step
        advantage="gae",
        value_head=True,
        value_coefficient=0.5,
        zero_stage=stage,
    )
    engine, twin = open_deepspeed_engine(settings), open_torch_engine(settings)
    train(engine, steps=1)
    engine.copy_state()(tmp_path)
    assert_close_metrics(train(engine, steps=2), train(twin, steps=3)[1:])
    assert largest_difference(weights_of(engine), weights_of(twin)) < 1e-5
    resumed = open_deepspeed_engine(replace(settings, seed=99))
    resumed.load(tmp_path)
    train(resumed, steps=2)
    assert largest_difference(weights_of(resumed), weights_of(engine)) == 0.0


def test_a_resumed_engine_continues_bit_identically(checkpoint_after_two_steps, model):
    directory, engine, expected_results = checkpoint_after_two_steps
    resumed = open_deepspeed_engine(gae_settings(model, zero_stage=1, seed=99))
    resumed.load(directory)
    assert resumed.version == 2
    assert train(resumed, steps=2) == expected_results
    assert largest_difference(weights_of(resumed), weights_of(engine)) == 0.0
    assert largest_difference(critic_weights(resumed), critic_weights(engine)) == 0.0


def test_a_bfloat16_engine_resumes_from_its_float32_master_weights(model, tmp_path):
    settings = some_train_settings(model, dtype="bfloat16", zero_stage=2, learning_rate=1e-5)
    engine = open_deepspeed_engine(settings)
    train(engine, steps=2)
    engine.copy_state()(tmp_path)
    train(engine, steps=2)
    resumed = open_deepspeed_engine(replace(settings, seed=99))
    resumed.load(tmp_path)
    train(resumed, steps=2)
    assert largest_difference(weights_of(resumed), weights_of(engine)) == 0.0


def test_a_checkpoint_names_no_latest_of_its_own(checkpoint_after_two_steps):
    directory, _, _ = checkpoint_after_two_steps
    assert not list(directory.rglob("latest*"))


def test_a_checkpoint_that_does_not_fit_is_refused_with_the_reason(checkpoint_after_two_steps, model, tmp_path):
    directory, _, _ = checkpoint_after_two_steps
    engine = open_deepspeed_engine(some_train_settings(model, zero_stage=2))
    with pytest.raises(UserError, match=f"{tmp_path}/policy holds no checkpoint; was the run begun with"):
        engine.load(tmp_path)
    untied = open_deepspeed_engine(some_train_settings(str(save_tiny_model(tmp_path / "untied", tied=False))))
    with pytest.raises(UserError, match=r"model\.lm_head\.weight is in one of them only: resume with the model"):
        untied.load(directory)
    torn = tmp_path / "torn"
    shutil.copytree(directory, torn)
    [path] = (torn / "policy").iterdir()
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"the checkpoint {torn}/policy cannot be read"):
        engine.load(torn)


@pytest.fixture(scope="module", params=[0, 1, 2])
def broken_step(request, model) -> tuple[str, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    engine = open_deepspeed_engine(some_train_settings(model, zero_stage=request.param))
    before = weights_of(engine)
    layer = engine._network.model.model.layers[1].mlp.down_proj
    layer.register_full_backward_hook(lambda _module, inputs, _outputs: tuple(each * math.nan for each in inputs))
    result = engine.step(a_batch(random_groups(0), micro_batch_tokens=40))
    return result.refusal, before, weights_of(engine)


def test_a_gradient_that_is_not_finite_is_refused_and_no_weight_moves(broken_step):
    refusal, before, after = broken_step
    assert refusal.startswith("the gradient of ")
    assert largest_difference(after, before) == 0.0


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), (1, "float32"), (2, "float32"), (1, "bfloat16"), (2, "bfloat16")]
)
def test_after_refused_batches_training_goes_on_as_if_they_had_never_been_there(stage, dtype, model):
    settings = gae_settings(model, zero_stage=stage, dtype=dtype)
    engine, undisturbed = open_deepspeed_engine(settings), open_deepspeed_engine(settings)
    train(engine, steps=1)
    for breaks in BREAKS:
        refuse_a_batch(engine, breaks)
    train(engine, steps=2)
    train(undisturbed, steps=3)
    assert largest_difference(weights_of(engine), weights_of(undisturbed)) == 0.0
    assert largest_difference(critic_weights(engine), critic_weights(undisturbed)) == 0.0


@pytest.mark.parametrize("field", ["behavior_logprobs_BT", "rewards_N"])
def test_a_loss_that_is_not_finite_is_refused_and_no_weight_moves(field, model):
    engine = open_deepspeed_engine(gae_settings(model))
    train(engine, steps=1)
    before, critic_before = weights_of(engine), critic_weights(engine)
    result = engine.step(with_nan(a_batch(random_groups(1), version=1, micro_batch_tokens=40), field))
    assert "is not finite" in result.refusal
    assert engine.version == 1
    assert largest_difference(weights_of(engine), before) == 0.0
    assert largest_difference(critic_weights(engine), critic_before) == 0.0


def test_a_micro_batch_of_over_stale_tokens_alone_is_stepped_over(model):
    old = a_group(a_trajectory(versions=0), a_trajectory(versions=0, reward=0.0))
    fresh = a_group(
        a_trajectory((0, 0, 0, 1, 1), versions=9, reward=0.5), a_trajectory((0, 0, 0, 1, 1), versions=9, reward=0.0)
    )
    batch = a_batch([old, fresh], version=9, micro_batch_tokens=10)
    assert [int(micro.loss_mask_BT.sum()) for micro in batch.micro_batches] == [0, 4]
    settings = some_train_settings(model)
    engines = [open_deepspeed_engine(settings), open_torch_engine(settings)]
    assert [engine.step(batch).refusal for engine in engines] == [None, None]
    assert largest_difference(*map(weights_of, engines)) < 1e-5


@pytest.mark.parametrize(("tied", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_an_exported_policy_is_the_same_function_in_transformers(tied, dtype, tmp_path):
    path = str(save_tiny_model(tmp_path / "start", tied=tied))
    engine = open_deepspeed_engine(some_train_settings(path, dtype=dtype))
    train(engine, steps=1)
    engine.export_huggingface(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto").eval()
    assert str(exported.dtype) == f"torch.{dtype}"
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, engine._network.model(ids).logits, rtol=0, atol=0)
