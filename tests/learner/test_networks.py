from functools import partial

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from common.lifecycle import UserError
from learner import networks
from learner.networks import CriticNetwork, PolicyNetwork, load_critic, load_policy
from tests.builders_learner import a_batch, random_groups
from tests.models import VOCAB_SIZE, a_tiny_model, forward_logprobs, save_tiny_model

MICRO = a_batch(random_groups(0, group_size=2)).micro_batches[0]
INPUTS = (MICRO.token_ids_BT, MICRO.attention_mask_BT, MICRO.loss_mask_BT)


def a_model_that_caps_its_logits() -> Gemma2ForCausalLM:
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


MODELS = {
    "tied": lambda: a_tiny_model(0, tied=True),
    "untied": lambda: a_tiny_model(0, tied=False),
    "capped": a_model_that_caps_its_logits,
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_equal_those_of_a_plain_transformers_forward_without_padding(kind, temperature):
    model = MODELS[kind]()
    logprobs_BT, _ = PolicyNetwork(model, temperature=temperature)(*INPUTS)
    for row, mask_T in enumerate(MICRO.loss_mask_BT):
        length = int(MICRO.attention_mask_BT[row].sum())
        alone = forward_logprobs(model, MICRO.token_ids_BT[row, :length].numpy(), temperature=temperature)
        expected = np.where(mask_T[1:length], alone, 0.0)
        np.testing.assert_allclose(logprobs_BT[row, 1:length].detach(), expected, atol=2e-5)
    assert not logprobs_BT[~MICRO.loss_mask_BT].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_is_that_of_the_distribution_the_token_was_drawn_from(temperature):
    model = a_tiny_model(0, tied=True)
    _, entropy_BT = PolicyNetwork(model, temperature=temperature)(*INPUTS)
    with torch.no_grad():
        logits = model(MICRO.token_ids_BT, attention_mask=MICRO.attention_mask_BT.long()).logits / temperature
    expected = torch.distributions.Categorical(logits=logits[:, :-1]).entropy()
    mask = MICRO.loss_mask_BT[:, 1:]
    torch.testing.assert_close(entropy_BT[:, 1:][mask], expected[mask], atol=2e-5, rtol=0)
    assert not entropy_BT[~MICRO.loss_mask_BT].any()


def test_what_stands_in_the_padding_changes_nothing():
    network = PolicyNetwork(a_tiny_model(0, tied=True), temperature=1.0)
    other_ids = torch.where(MICRO.attention_mask_BT, MICRO.token_ids_BT, 77)
    assert not MICRO.attention_mask_BT.all()
    torch.testing.assert_close(network(*INPUTS)[0], network(other_ids, *INPUTS[1:])[0], atol=1e-6, rtol=0)


def test_a_micro_batch_of_over_stale_tokens_alone_gives_a_zero_gradient_rather_than_none():
    network = PolicyNetwork(a_tiny_model(0, tied=True), temperature=1.0)
    logprobs_BT, _ = network(*INPUTS[:2], torch.zeros_like(MICRO.loss_mask_BT))
    logprobs_BT.sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def a_critic() -> CriticNetwork:
    critic = CriticNetwork(a_tiny_model(0, tied=True).model)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    return critic


@torch.no_grad()
def test_the_value_at_a_token_sees_the_tokens_before_it_and_not_the_token_itself():
    critic = a_critic()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    values = critic(ids, mask)
    for t in range(ids.shape[1]):
        changed = ids.clone()
        changed[0, t] = 42
        moved = (critic(changed, mask) - values).abs()[0] > 1e-6
        assert moved.tolist() == [place > t for place in range(ids.shape[1])]


@torch.no_grad()
def test_a_fresh_critic_finds_every_state_worth_nothing():
    assert not CriticNetwork(a_tiny_model(0, tied=True).model)(*INPUTS[:2]).any()


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_a_value_head_says_what_a_critic_of_the_same_weights_says(kind):
    model = MODELS[kind]()
    critic, policy = CriticNetwork(model.base_model), PolicyNetwork(model, temperature=1.0, has_value_head=True)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
    policy.value_head.load_state_dict(critic.head.state_dict())
    logprobs_BT, _, values_BT = policy(*INPUTS)
    seen_BT = MICRO.attention_mask_BT
    torch.testing.assert_close(values_BT[seen_BT], critic(*INPUTS[:2])[seen_BT], atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.values(policy)(*INPUTS[:2])[0], values_BT, atol=1e-6, rtol=0)
    assert torch.equal(logprobs_BT, PolicyNetwork(model, temperature=1.0)(*INPUTS)[0])


LOADERS = {"policy": partial(load_policy, temperature=1.0), "critic": load_critic}


@pytest.mark.parametrize("kind", LOADERS)
def test_a_model_that_does_not_exist_is_named(kind, tmp_path):
    with pytest.raises(UserError, match=f"cannot load the model {tmp_path}/nowhere: "):
        LOADERS[kind](str(tmp_path / "nowhere"), dtype="float32")


def test_attention_is_computed_as_the_setting_says_and_by_sdpa_where_no_flash_attention_is_installed(tmp_path):
    model = str(save_tiny_model(tmp_path, tied=True))
    implementations = [
        load_policy(model, dtype="bfloat16", temperature=1.0, attention=attention).model.config._attn_implementation
        for attention in ("auto", "sdpa", "eager")
    ]
    assert implementations == ["sdpa", "sdpa", "eager"]
    with pytest.raises(UserError, match=r"cannot load the model .*[Ff]lash"):
        load_policy(model, dtype="bfloat16", temperature=1.0, attention="flash_attention_2")


def test_flash_attention_is_taken_by_itself_where_it_is_installed_and_the_model_can(tmp_path, monkeypatch):
    model = str(save_tiny_model(tmp_path, tied=True))
    asked: list[object] = []
    load = networks.AutoModelForCausalLM.from_pretrained

    def from_pretrained(name, **settings):
        asked.append(settings.pop("attn_implementation", None))
        if asked[-1] == networks.FLASH and "can" not in asked:
            raise ValueError("it cannot")
        return load(name, **settings)

    monkeypatch.setattr(networks, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(networks.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_policy(model, dtype="bfloat16", temperature=1.0)
    assert asked == ["flash_attention_2", None]  # this one could not
    asked[:] = ["can"]
    load_policy(model, dtype="bfloat16", temperature=1.0)
    load_policy(model, dtype="float32", temperature=1.0)  # which flash attention does not compute in
    assert asked == ["can", "flash_attention_2", None]
