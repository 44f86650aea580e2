"""Adapters alone are trained, checkpointed and published; without them the policy is its own reference."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from common.lifecycle import UserError
from learner.base_model import describe_adapter
from learner.config import LearnerConfig
from learner.deepspeed_engine import open_deepspeed_engine
from learner.lora_settings import AdapterDescription, LoraSettings
from learner.networks import load_policy
from learner.ppo_engine import PpoEngine
from learner.reference import ReferencePolicy
from learner.reward_settings import KlSettings
from learner.slots import lay_out
from learner.torch_engine import open_torch_engine
from learner.training import MicroBatch, TrainSettings
from tests.builders_learner import a_batch, largest_difference, random_groups, some_train_settings, train
from tests.models import save_tiny_model

LORA = LoraSettings(rank=4, alpha=8.0)
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


def lora_settings(model: str, **overrides) -> TrainSettings:
    return some_train_settings(model, **({"lora": LORA, "learning_rate": 1e-2} | overrides))


@pytest.fixture(scope="module")
def trained(model) -> PpoEngine:
    engine = open_torch_engine(lora_settings(model, kl=KlSettings(coefficient=0.1, reference_model=model)))
    train(engine, steps=3)
    return engine


def base_of(engine: PpoEngine) -> dict[str, torch.Tensor]:
    parameters = engine._network.model.named_parameters()
    return {name: each.detach().clone() for name, each in parameters if not each.requires_grad}


def adapters_of(engine: PpoEngine) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in engine._network.adapters.parameters()}


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_before_the_first_step_the_policy_is_the_model_it_began_as(model):
    policy = load_policy(model, dtype="float32", temperature=1.0, lora=LORA)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(policy.model), logits_of(base), rtol=0, atol=0)


def test_adapters_move_and_nothing_else_does(model):
    engine = open_torch_engine(lora_settings(model))
    adapters, base = adapters_of(engine), base_of(engine)
    train(engine, steps=2)
    assert largest_difference(base_of(engine), base) == 0.0
    assert all(bool((tensor != adapters[name]).any()) for name, tensor in adapters_of(engine).items())


def test_every_linear_layer_but_the_output_has_a_pair_of_tensors(trained):
    tensors = dict(trained._network.adapters.parameters())
    assert len(tensors) == 2 * 2 * 7  # A and B, layers, projections
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (128, 4)


def test_chosen_layers_alone_have_adapters(model):
    lora = LoraSettings(rank=2, alpha=4.0, target_modules=("q_proj", "v_proj"))
    policy = load_policy(model, dtype="float32", temperature=1.0, lora=lora)
    layers = {name.split(".")[-3] for name, _ in policy.adapters.parameters()}
    assert layers == {"q_proj", "v_proj"}


@pytest.mark.parametrize("tied", [True, False])
def test_merged_weights_are_the_formula_written_as_loops(tied, tmp_path):
    path = str(save_tiny_model(tmp_path / "model", tied=tied))
    engine = open_torch_engine(lora_settings(path, lora_snapshots="merged"))
    train(engine, steps=2)
    engine.export_huggingface(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(exported), logits_of(engine._network.model), rtol=0, atol=1e-5)
    published = dict(engine.snapshot_tensors())
    assert published.keys() == dict(exported.named_parameters()).keys()
    assert all(torch.equal(published[name], each) for name, each in exported.named_parameters())
    name = "model.layers.0.self_attn.k_proj"
    [a_RI, b_OR] = (adapters_of(engine)[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
    start = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).get_parameter(f"{name}.weight").detach()
    merged = exported.get_parameter(f"{name}.weight").detach()
    for row, column in [(0, 0), (3, 7), (31, 63)]:
        product = sum(float(b_OR[row, rank]) * float(a_RI[rank, column]) for rank in range(LORA.rank))
        expected = float(start[row, column]) + LORA.alpha / LORA.rank * product
        assert float(merged[row, column]) == pytest.approx(expected, abs=1e-6)


def test_what_is_published_is_the_adapter_beside_the_model_that_it_began_as(trained, model):
    published = dict(trained.snapshot_tensors())
    assert published.keys() == adapters_of(trained).keys()
    assert largest_difference(published, adapters_of(trained)) == 0.0
    assert describe_adapter(LORA, lay_out(published.items())) == AdapterDescription(
        rank=4,
        alpha=8.0,
        target_modules=("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"),
    )
    base = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    found = dict(trained.base_model_tensors())
    assert found.keys() == base.keys()
    assert largest_difference(found, base) == 0.0


def test_the_exported_adapters_are_loaded_by_peft(trained, model, tmp_path):
    trained.export_huggingface(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(trained._network.model), rtol=0, atol=1e-6)
    assert loaded.peft_config["default"].base_model_name_or_path == model


def test_without_its_adapters_the_policy_says_what_a_second_copy_would(trained, model):
    batch = a_batch(random_groups(5), micro_batch_tokens=40)
    copy = ReferencePolicy(
        load_policy(model, dtype="float32", temperature=0.9), device=torch.device("cpu"), offload=False
    )
    own = trained._reference.logprobs(batch.micro_batches)
    for one, other in zip(own, copy.logprobs(batch.micro_batches), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    micro = batch.micro_batches[0]
    after, _ = trained._policy.forward(micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
    assert after.requires_grad  # the adapters are on again
    assert float((after.detach() - own[0]).abs().max()) > 1e-3


def test_the_distance_to_the_reference_grows_from_zero(model):
    engine = open_torch_engine(lora_settings(model, kl=KlSettings(coefficient=0.1, reference_model=model)))
    distances = [result.metrics["reference_kl_per_trajectory"] for result in train(engine, steps=4)]
    assert abs(distances[0]) < 1e-6
    assert abs(distances[-1]) > 1e-3


@pytest.fixture(scope="module")
def twin(model) -> PpoEngine:
    engine = open_torch_engine(lora_settings(model, learning_rate=1e-3))
    train(engine, steps=3)
    return engine


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_on_deepspeed_adapters_become_what_they_become_on_plain_torch(stage, model, twin):
    engine = open_deepspeed_engine(lora_settings(model, learning_rate=1e-3, zero_stage=stage))
    train(engine, steps=3)
    assert largest_difference(adapters_of(engine), adapters_of(twin)) < 2e-5


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 1), ("bfloat16", 2)])
def test_a_resumed_engine_continues_bit_identically(dtype, stage, model, tmp_path):
    lora = LoraSettings(rank=4, alpha=8.0, dropout=0.2)  # draws random numbers
    settings = lora_settings(model, dtype=dtype, zero_stage=stage, lora=lora)
    engine = open_deepspeed_engine(settings)
    train(engine, steps=2)
    engine.copy_state()(tmp_path)
    expected = train(engine, steps=2)
    resumed = open_deepspeed_engine(replace(settings, seed=99))
    resumed.load(tmp_path)
    assert train(resumed, steps=2) == expected
    assert largest_difference(adapters_of(resumed), adapters_of(engine)) == 0.0
    assert largest_difference(base_of(resumed), base_of(engine)) == 0.0
    model_bytes = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < model_bytes


def test_other_adapters_than_those_of_the_checkpoint_are_refused(model, twin, tmp_path):
    twin.copy_state()(tmp_path)
    other = open_torch_engine(lora_settings(model, lora=LoraSettings(rank=4, alpha=8.0, target_modules=("q_proj",))))
    with pytest.raises(UserError, match="adapters of rank 4, alpha 8, all-linear, dropout 0, and the settings say "):
        other.load(tmp_path)
    with pytest.raises(UserError, match="and the settings say none: resume with the same"):
        open_torch_engine(some_train_settings(model)).load(tmp_path)


def test_dropout_acts_where_a_gradient_is_computed_and_nowhere_else(model):
    engine = open_torch_engine(lora_settings(model, lora=LoraSettings(rank=4, alpha=8.0, dropout=0.5)))
    train(engine, steps=1)
    micro: MicroBatch = a_batch(random_groups(1), micro_batch_tokens=1000).micro_batches[0]
    inputs = (micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
    with torch.no_grad():
        quiet = [engine._policy.forward(*inputs)[0] for _ in range(2)]
    loud = [engine._policy.forward(*inputs)[0].detach() for _ in range(2)]
    assert torch.equal(*quiet)
    assert not torch.equal(*loud)


def test_adapters_in_what_is_not_a_linear_layer_are_refused(tmp_path):
    model = str(save_tiny_model(tmp_path / "untied", tied=False))
    lora = LoraSettings(rank=4, alpha=8.0, target_modules=("q_proj", "embed_tokens"))
    with pytest.raises(UserError, match=r"lora_target_modules q_proj, embed_tokens: .*embed_tokens is not a linear"):
        load_policy(model, dtype="float32", temperature=1.0, lora=lora)


def test_layers_that_the_model_does_not_have_are_named(model):
    lora = LoraSettings(rank=4, alpha=8.0, target_modules=("w_proj",))
    with pytest.raises(UserError, match=r"lora_target_modules w_proj: .*not found"):
        load_policy(model, dtype="float32", temperature=1.0, lora=lora)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lora_rank": -1}, "lora_rank must be at least 1, got -1; 0 trains the whole policy"),
        ({"lora_rank": 8, "lora_alpha": 0.0}, "lora_alpha must be finite and > 0, got 0.0"),
        ({"lora_rank": 8, "lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1, got 1.0"),
        ({"lora_alpha": 8.0}, "lora_rank is 0: set it"),
        (
            {"lora_rank": 8, "kl_coefficient": 0.1, "reference_offload": True},
            "with lora_rank the reference is the policy without its adapters",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        LearnerConfig(**settings)


def test_the_scale_is_two_unless_it_is_said():
    assert LearnerConfig(lora_rank=8).lora_settings == LoraSettings(rank=8, alpha=16.0)
    assert LearnerConfig().lora_settings is None
