"""PpoEngine on plain torch: what a step does, whatever the engine below."""

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.fingerprint import fingerprint_tokenizer
from common.lifecycle import UserError
from learner.config import LearnerConfig
from learner.loss_settings import WITH_CRITIC
from learner.ppo_engine import PpoEngine
from learner.torch_engine import open_torch_engine
from tests.builders_learner import (
    BREAKS,
    a_batch,
    a_group,
    a_trajectory,
    gradients_of_one_step,
    largest_difference,
    random_groups,
    refuse_a_batch,
    some_train_settings,
    train,
    weights_of,
    with_nan,
)
from tests.models import save_tiny_model

GAE = {"advantage": "gae", "advantage_settings": {"gamma": 0.9, "gae_lambda": 0.8}}
HEAD = GAE | {"value_head": True, "value_coefficient": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


def an_engine(model: str, **overrides) -> PpoEngine:
    critic = model if overrides.get("advantage") in WITH_CRITIC and not overrides.get("value_head") else None
    return open_torch_engine(some_train_settings(model, critic_model=critic, **overrides))


def all_weights(engine: PpoEngine) -> dict[str, torch.Tensor]:
    """Of the critic, too."""
    return {
        f"{index} {name}": parameter.detach().clone()
        for index, network in enumerate(engine._networks())
        for name, parameter in network.module.named_parameters()
    }


@pytest.mark.parametrize("algorithm", [{}, {"loss": "ppo"}, GAE, HEAD], ids=["grpo", "ppo", "gae", "value head"])
def test_the_size_of_micro_batches_does_not_change_the_update(model, algorithm):
    groups = random_groups(0)
    after = []
    for tokens, num_micro_batches in [(1, 12), (40, 4), (10_000, 1)]:
        batch = a_batch(groups, micro_batch_tokens=tokens)
        assert len(batch.micro_batches) >= num_micro_batches
        after.append(gradients_of_one_step(an_engine(model, **algorithm), batch))
    assert largest_difference(after[0], after[2]) < 1e-6
    assert largest_difference(after[1], after[2]) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in after[2].values()) > 1e-3


def test_the_order_in_which_groups_arrive_does_not_change_the_update(model):
    groups = random_groups(0)
    one = gradients_of_one_step(an_engine(model), a_batch(groups))
    other = gradients_of_one_step(an_engine(model), a_batch(groups[::-1]))
    assert largest_difference(one, other) < 1e-6


def test_a_step_makes_rewarded_tokens_likelier_and_the_others_less_likely(model):
    good = a_trajectory((0, 0, 1, 1), token_ids=[5, 6, 7, 8], reward=1.0)
    bad = a_trajectory((0, 0, 1, 1), token_ids=[5, 6, 9, 10], reward=0.0)
    batch = a_batch([a_group(good, bad)])
    engine = an_engine(model, warmup_steps=0, learning_rate=1e-3)

    @torch.no_grad()
    def likelihood() -> list[float]:
        micro = batch.micro_batches[0]
        logprobs, _ = engine._policy.forward(micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
        return logprobs.sum(dim=1).tolist()

    before = likelihood()
    assert engine.step(batch).refusal is None
    after = likelihood()
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_a_token_older_than_the_limit_gets_no_gradient(model):
    """Whatever its reward and its behavior log-probability say: the guard is in the learner, not in its servers."""
    ids = [5, 6, 7, 8, 9, 10]
    peer = a_trajectory((0, 1, 1), token_ids=[5, 6, 7], versions=9, reward=-1.0)

    def gradients(second_turn_version: int, behavior_logprob: float = -1.0) -> dict[str, torch.Tensor]:
        mixed = a_trajectory(
            (0, 0, 1, 1, 1, 1),
            token_ids=ids,
            versions=[second_turn_version] * 2 + [9] * 2,
            behavior_logprob=behavior_logprob,
        )
        if behavior_logprob != -1.0:
            mixed.behavior_logprobs[4:] = -1.0  # only the old tokens differ
        return gradients_of_one_step(an_engine(model), a_batch([a_group(mixed, peer)], version=9))

    too_old = gradients(6)
    assert largest_difference(too_old, gradients(6, behavior_logprob=-9.0)) == 0.0
    assert largest_difference(too_old, gradients(7)) > 1e-3


def test_over_stale_tokens_are_counted_and_fresh_ones_reported(model):
    old = a_trajectory((0, 1, 1, 1), versions=[0, 1, 2])
    batch = a_batch([a_group(old, a_trajectory((0, 0, 1), versions=3, reward=0.0))], version=3)
    metrics = an_engine(model).step(batch).metrics
    assert (metrics["over_stale_tokens"], metrics["trained_tokens"]) == (1, 3)
    assert (metrics["staleness_max"], metrics["staleness_mean"]) == (2, 1)


def test_a_batch_without_a_fresh_token_is_refused(model):
    engine = an_engine(model)
    result = engine.step(a_batch([a_group(a_trajectory(), a_trajectory())], version=9))
    assert result.refusal == "none of its tokens is fresh enough to be trained"
    assert engine.version == 0


@pytest.mark.parametrize("algorithm", [{}, GAE, HEAD], ids=["grpo", "gae", "value head"])
@pytest.mark.parametrize("field", ["behavior_logprobs_BT", "rewards_N"])
def test_a_loss_that_is_not_finite_is_refused_and_no_weight_moves(model, algorithm, field):
    engine = an_engine(model, **algorithm)
    train(engine, steps=1)
    before = all_weights(engine)
    batch = with_nan(a_batch(random_groups(1), version=1, micro_batch_tokens=40), field)
    result = engine.step(batch)
    assert "is not finite" in result.refusal
    assert engine.version == 1
    assert largest_difference(all_weights(engine), before) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e15])  # finite, but beyond sense
@pytest.mark.parametrize("algorithm", [{}, GAE], ids=["policy", "critic"])
def test_a_gradient_that_is_not_finite_is_refused_by_name_and_no_weight_moves(model, algorithm, bad):
    engine = an_engine(model, **algorithm)
    train(engine, steps=1)  # a fresh critic's head is 0, and so is what it passes back
    before = all_weights(engine)
    network = engine._networks()[-1].module
    norm = next(module for name, module in network.named_modules() if name.endswith("layers.1.mlp.down_proj"))
    norm.register_full_backward_hook(lambda _module, inputs, _outputs: tuple(each * bad for each in inputs))
    result = engine.step(a_batch(random_groups(1), version=1, micro_batch_tokens=40))
    assert re.fullmatch(r"the gradient of .*embed_tokens.weight and \d+ more tensors is not finite.*", result.refusal)
    assert engine.version == 1
    assert largest_difference(all_weights(engine), before) == 0.0


@pytest.mark.parametrize("algorithm", [{}, GAE, HEAD], ids=["grpo", "gae", "value head"])
@pytest.mark.parametrize("breaks", BREAKS)
def test_after_a_refused_batch_training_goes_on_as_if_it_had_never_been_there(model, algorithm, breaks):
    engine, undisturbed = an_engine(model, **algorithm), an_engine(model, **algorithm)
    train(engine, steps=1)
    refuse_a_batch(engine, breaks)
    train(engine, steps=2)
    train(undisturbed, steps=3)
    assert largest_difference(all_weights(engine), all_weights(undisturbed)) == 0.0


def test_what_was_wrong_with_several_networks_is_not_held_against_the_next_batch(model):
    engine = an_engine(model, **GAE)
    train(engine, steps=1)
    spoilt = [
        next(module for name, module in network.module.named_modules() if name.endswith("layers.1.mlp"))
        for network in engine._networks()
    ]
    handles = [
        module.register_full_backward_hook(lambda _module, inputs, _outputs: tuple(each * math.nan for each in inputs))
        for module in spoilt
    ]
    assert engine.step(a_batch(random_groups(1), version=1)).refusal is not None
    for handle in handles:
        handle.remove()
    assert engine.step(a_batch(random_groups(1), version=1)).refusal is None


def test_a_skipped_step_has_a_version_and_the_parameters_of_the_one_before(model):
    engine = an_engine(model, on_nonfinite="skip")
    train(engine, steps=1)
    before = all_weights(engine)
    result = engine.step(with_nan(a_batch(random_groups(1), version=1), "rewards_N"))
    assert (engine.version, result.metrics["refused"], result.metrics["trained_tokens"]) == (2, 1.0, 0.0)
    assert largest_difference(all_weights(engine), before) == 0.0
    assert train(engine, steps=1)[0].metrics["refused"] == 0.0


def test_a_model_whose_weights_broke_is_not_trained_further(model):
    engine = an_engine(model)
    dict(engine.snapshot_tensors())["model.norm.weight"][0] = math.nan
    assert engine.step(a_batch(random_groups(0))).refusal == "the loss of micro-batch 0 is not finite"


@pytest.mark.parametrize("loss", ["decoupled_ppo", "ppo"])
def test_a_group_of_one_reward_alone_moves_nothing_but_what_weight_decay_moves(model, loss):
    engine = an_engine(model, loss=loss, weight_decay=0.0)
    before = weights_of(engine)
    result = engine.step(a_batch([a_group(*[a_trajectory(reward=0.1) for _ in range(7)])]))
    assert result.metrics["grad_norm"] == 0.0
    assert largest_difference(weights_of(engine), before) == 0.0


def test_server_and_learner_are_compared_where_they_mean_the_same_parameters(model):
    engine = an_engine(model)
    micro = a_batch([a_group(a_trajectory(), a_trajectory(reward=0.0))]).micro_batches[0]
    with torch.no_grad():
        logprobs, _ = engine._policy.forward(micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
    trajectories = [a_trajectory(versions=[0, 1]), a_trajectory(versions=[0, 1], reward=0.0)]
    for trajectory in trajectories:
        trajectory.behavior_logprobs[2] = 0.0  # far off, but sampled by an older version
        trajectory.behavior_logprobs[3] = float(logprobs[0, 3]) + 0.25
    metrics = engine.step(a_batch([a_group(*trajectories)], version=1)).metrics
    assert metrics["mismatch_abs"] == pytest.approx(0.25, abs=1e-5)


def test_the_value_targets_are_learned(model):
    engine = an_engine(model, **GAE, lr_schedule="constant", warmup_steps=0, learning_rate=0.0)
    batch = a_batch(random_groups(0), micro_batch_tokens=40)
    losses = [engine.step(batch).metrics["value_loss"] for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


def test_while_the_critic_warms_up_it_learns_alone_and_then_both_do(model):
    engine, critic_alone = an_engine(model, **GAE, critic_warmup_steps=2), an_engine(model, **GAE, learning_rate=0.0)
    start = weights_of(engine)
    results = train(engine, steps=2)
    train(critic_alone, steps=2)
    assert largest_difference(weights_of(engine), start) == 0.0
    assert [result.metrics["learning_rate"] for result in results] == [0.0, 0.0]
    learned = {name: each for name, each in all_weights(engine).items() if name.startswith("1")}
    expected = {name: each for name, each in all_weights(critic_alone).items() if name.startswith("1")}
    assert largest_difference(learned, expected) == 0.0
    assert train(engine, steps=1)[0].metrics["grad_norm"] > 0
    assert largest_difference(weights_of(engine), start) > 0.0


def test_without_a_critic_there_is_nothing_to_warm_up(model):
    with pytest.raises(ValueError, match="critic_warmup_steps 3: advantage grpo has no critic"):
        some_train_settings(model, critic_warmup_steps=3)


@pytest.mark.parametrize("algorithm", [{}, GAE, HEAD], ids=["grpo", "gae", "value head"])
def test_a_resumed_engine_continues_bit_identically(model, algorithm, tmp_path):
    engine = an_engine(model, **algorithm)
    train(engine, steps=2)
    engine.copy_state()(tmp_path)
    expected_results = train(engine, steps=2)
    resumed = an_engine(model, seed=99, **algorithm)
    resumed.load(tmp_path)
    assert resumed.version == 2
    assert train(resumed, steps=2) == expected_results
    assert largest_difference(all_weights(resumed), all_weights(engine)) == 0.0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_exported_policy_is_the_same_function_in_transformers(tied, tmp_path):
    engine = an_engine(str(save_tiny_model(tmp_path / "start", tied=tied)))
    train(engine, steps=1)
    engine.export_huggingface(tmp_path / "exported")
    ids = torch.tensor([[5, 6, 7, 8]])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, engine._network.model(ids).logits, rtol=0, atol=0)
    assert exported.config.tie_word_embeddings is tied
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("start", "exported"))
    assert fingerprint_tokenizer(after) == fingerprint_tokenizer(before)


def test_a_snapshot_names_tied_parameters_once_and_shares_the_memory_that_is_trained(model, tmp_path):
    untied = an_engine(str(save_tiny_model(tmp_path / "untied", tied=False)))
    assert dict(untied.snapshot_tensors()).keys() - dict(an_engine(model).snapshot_tensors()).keys() == {
        "lm_head.weight"
    }
    (name, tensor), *_ = untied.snapshot_tensors()
    before = tensor.clone()
    train(untied, steps=1)
    assert not torch.equal(dict(untied.snapshot_tensors())[name], before)


def test_the_learning_rate_of_a_step_is_the_one_reported(model):
    rates = [result.metrics["learning_rate"] for result in train(an_engine(model), steps=3)]
    assert rates == pytest.approx([0.005, 0.01, 0.01 * 8 / 9])


def test_the_gradient_with_a_value_head_is_that_of_the_policy_and_so_much_of_the_values(model):
    """The twin: policy and critic as two networks of equal weights, whose gradients are then added."""
    batch = a_batch(random_groups(0), micro_batch_tokens=40)
    shared, own = an_engine(model, **HEAD, max_grad_norm=1e9), an_engine(model, **GAE, max_grad_norm=1e9)
    weight_1H = torch.randn(own._critic.module.head.weight.shape, generator=torch.Generator().manual_seed(0))
    for head in (shared._network.value_head, own._critic.module.head):
        head.weight.data.copy_(weight_1H)
    of_both, of_each = gradients_of_one_step(shared, batch), gradients_of_one_step(own, batch)
    assert of_both.keys() - of_each.keys() == {"0 value_head.weight", "0 value_head.bias"}
    for name, gradient in of_both.items():
        critic_name = name.replace("0 value_head.", "1 head.").replace("0 model.model.", "1 body.")
        expected = of_each.get(name, torch.zeros(())) + 0.5 * of_each[critic_name]
        assert float((gradient - expected).abs().max()) < 1e-6 * max(1.0, float(expected.abs().max()))
    assert max(float(of_each[name].abs().max()) for name in of_each if name.startswith("1 body.")) > 1e-3


def test_a_value_head_is_trained_and_checkpointed_and_stays_at_home(model, tmp_path):
    engine = an_engine(model, **HEAD)
    train(engine, steps=2)
    assert engine._network.value_head.weight.any()
    assert weights_of(engine).keys() == weights_of(an_engine(model)).keys()
    engine.copy_state()(tmp_path / "checkpoint")
    engine.export_huggingface(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert largest_difference(dict(exported.named_parameters()), weights_of(engine)) == 0.0
    with pytest.raises(UserError, match=r"value_head\.\w+ is in one of them only"):
        an_engine(model).load(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"advantage": "grpo"}, "critic value_head: advantage grpo has no critic; use gae or vtrace"),
        ({"advantage": "gae", "critic_model": "m"}, "critic_model m goes with own"),
        ({"advantage": "gae", "critic_warmup_steps": 2}, "take --critic own"),
    ],
)
def test_what_a_value_head_cannot_have_is_refused(overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        some_train_settings("m", value_head=True, **overrides)
    with pytest.raises(ValueError, match=complaint):
        LearnerConfig(critic="value_head", **overrides)


def test_gae_needs_a_critic_and_grpo_none():
    with pytest.raises(ValueError, match="gae and vtrace need one, the others none"):
        some_train_settings("m", advantage="gae")
    with pytest.raises(ValueError, match="gae and vtrace need one, the others none"):
        some_train_settings("m", critic_model="m")


def test_bfloat16_is_refused_at_stage_0_and_by_the_torch_engine(model):
    settings = some_train_settings(model, dtype="bfloat16")
    with pytest.raises(ValueError, match="the torch engine trains in float32, got bfloat16"):
        open_torch_engine(settings)
    with pytest.raises(ValueError, match="dtype bfloat16 needs zero_stage 1, 2 or 3"):
        replace(settings, zero_stage=0)
