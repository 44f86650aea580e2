"""Whether prompts are computed once: only by models that then say the same, and the log tells which."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from learner.deepspeed_engine import open_deepspeed_engine
from learner.engine_settings import EngineSettings
from learner.networks import CriticNetwork, PolicyNetwork
from learner.packing import can_share
from learner.prompt_sharing import share_prompts_where_possible
from learner.reward_settings import KlSettings
from learner.segments import let_rows_be_segmented
from tests.builders_learner import a_batch, largest_difference, random_groups, some_train_settings, weights_of
from tests.models import VOCAB_SIZE, a_tiny_model, save_tiny_model

CPU = torch.device("cpu")
ANEW = "a prompt is computed anew for each of its trajectories: "
SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def model(tmp_path) -> str:
    return str(save_tiny_model(tmp_path / "tied", tied=True))


def a_policy(model: nn.Module) -> PolicyNetwork:
    return PolicyNetwork(model.eval(), temperature=1.0)


def tiny() -> nn.Module:
    return a_tiny_model(0, tied=True)


class IgnoresSegments(Qwen2ForCausalLM):
    """Its attention is told nothing of what a row is made of: it sees all of it."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__(config)
        forward = self.model.forward
        self.model.forward = lambda *args, segmented=None, **kwargs: forward(*args, **kwargs)


def ignoring() -> nn.Module:
    return IgnoresSegments(Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1, initializer_range=0.5))


def with_a_window() -> nn.Module:
    return MistralForCausalLM(MistralConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, sliding_window=4096))


def eager() -> nn.Module:
    model = tiny()
    model.config._attn_implementation = "eager"
    return model


def with_a_mask_of_its_own() -> nn.Module:
    model = tiny()
    for layer in model.model.layers:
        layer.self_attn.forward = partial(_attend_with_another_mask, layer.self_attn.forward)
    return model


def _attend_with_another_mask(forward: Callable[..., Any], *, hidden_states, attention_mask, **kwargs) -> Any:
    num_tokens = hidden_states.shape[1]
    mask = attention_mask.expand(-1, -1, num_tokens, num_tokens)
    return forward(hidden_states=hidden_states, attention_mask=mask, **kwargs)


REFUSED: dict[str, tuple[Callable[[], nn.Module], EngineSettings, str]] = {
    "it is not wanted": (tiny, EngineSettings(share_prompts="never"), "--share-prompts never"),
    "nothing is packed": (tiny, EngineSettings(packing=False), "--packing false"),
    "rows are spread": (tiny, EngineSettings(sequence_parallel=2), "--sequence-parallel spreads rows over ranks"),
    "attention is another": (eager, EngineSettings(), "the attention of Qwen2Model is eager, and not sdpa"),
    "layers see a window": (
        with_a_window, EngineSettings(),
        "MistralModel has layers in which a token does not see all tokens before it",
    ),
    "a layer has something to say of the mask": (
        with_a_mask_of_its_own, EngineSettings(),
        "Qwen2Model says something else of trajectories whose prompt stands once",
    ),
    "attention ignores it": (
        ignoring, EngineSettings(), "Qwen2Model says something else of trajectories whose prompt stands once"
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_prompts_are_computed_anew_where_they_cannot_be_shared_and_the_log_says_why(why, caplog):
    build, settings, sentence = REFUSED[why]
    policy, critic = a_policy(build()), CriticNetwork(tiny().model)
    with caplog.at_level(logging.INFO):
        share_prompts_where_possible([policy, critic], settings, CPU)
    assert caplog.messages == [ANEW + sentence]
    assert not policy.arrangement.shares
    assert not critic.arrangement.shares


def test_one_network_that_cannot_keeps_prompts_from_being_shared_by_all():
    networks = [a_policy(tiny()), CriticNetwork(tiny().model), a_policy(ignoring())]
    share_prompts_where_possible(networks, EngineSettings(), CPU)
    assert not any(network.arrangement.shares for network in networks)


def test_all_networks_share_prompts_where_all_can(caplog):
    other = GPT2LMHeadModel(GPT2Config(**SMALL, bos_token_id=None, eos_token_id=None))
    networks = [a_policy(tiny()), CriticNetwork(tiny().model), a_policy(other)]
    with caplog.at_level(logging.INFO):
        share_prompts_where_possible(networks, EngineSettings(), CPU)
    assert all(network.arrangement.shares for network in networks)
    assert caplog.messages == ["a prompt is computed once for all trajectories that begin with it"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_takes_a_model_in_the_precision_it_is_trained_in(dtype):
    let_rows_be_segmented()
    assert can_share(a_tiny_model(0, tied=True, dtype=dtype).base_model, VOCAB_SIZE, CPU)


def test_shared_and_repeated_prompts_are_trained_alike_with_critic_and_reference(model):
    after = []
    for share in ("auto", "never"):
        settings = some_train_settings(
            model,
            adam_epsilon=1e-3,
            advantage="gae",
            critic_model=model,
            kl=KlSettings(coefficient=0.1, reference_model=model),
            engine=EngineSettings(share_prompts=share),
        )
        engine = open_deepspeed_engine(settings)
        assert engine.layout.shares_prompts == (share == "auto")
        for _ in range(2):
            groups = random_groups(engine.version, version=engine.version, shared=2)
            batch = a_batch(groups, version=engine.version, micro_batch_tokens=60, layout=engine.layout)
            assert engine.step(batch).refusal is None
        after.append(weights_of(engine))
    assert largest_difference(*after) < 1e-5
