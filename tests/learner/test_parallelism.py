"""Which ranks may share what: refused before anything large is loaded."""

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import AutoConfig, GPT2Config, GPT2Model, LlamaConfig, MixtralConfig, PreTrainedConfig

from common.lifecycle import UserError
from learner.config import LearnerConfig
from learner.engine_settings import EngineSettings
from learner.lora_settings import LoraSettings
from learner.parallelism import check_attention, check_parallelism
from learner.reward_settings import KlSettings
from learner.tensor_parallel import partition_config
from tests.builders_learner import some_train_settings
from tests.models import save_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


def a_config(directory: Path, model: str, **changes: Any) -> str:
    config = AutoConfig.from_pretrained(model)
    for name, value in changes.items():
        setattr(config, name, value)
    config.save_pretrained(directory)
    return str(directory)


def test_sequences_may_be_shared_by_as_many_ranks_as_divide_all_and_the_heads(model: str, tmp_path: Path):
    def check(model: str, size: int, num_ranks: int, **overrides: Any) -> None:
        check_parallelism(
            some_train_settings(model, engine=EngineSettings(sequence_parallel=size), **overrides), num_ranks
        )

    check(model, 1, 3)
    check(model, 2, 4)
    with pytest.raises(UserError, match=r"needs a number of ranks that is a multiple of 2, got 3; --ranks"):
        check(model, 2, 3)
    with pytest.raises(UserError, match=r"has 2 attention heads, 1 of them for keys and values"):
        check(model, 4, 4)
    six = a_config(tmp_path / "six", model, num_attention_heads=12, num_key_value_heads=3)
    check(six, 3, 3)
    check(six, 6, 6)
    with pytest.raises(UserError, match=r"has 12 attention heads, 3 of them for keys and values"):
        check(six, 2, 2)
    with pytest.raises(UserError, match="six has 12 attention heads"):
        check(model, 2, 2, kl=KlSettings(coefficient=0.1, reference_model=six))


def test_rotary_embeddings_that_need_a_sequences_length_are_refused(model: str, tmp_path: Path):
    rotary = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = a_config(tmp_path / "dynamic", model, rope_parameters=rotary)
    settings = some_train_settings(dynamic, engine=EngineSettings(sequence_parallel=2))
    with pytest.raises(UserError, match=r"are dynamic, which depend on a sequence's length"):
        check_parallelism(settings, 2)


class SetInItsWays(GPT2Model):
    """As older remote code is written: without room for what it does not know."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return super().forward(input_ids, attention_mask=attention_mask)


def test_a_model_that_hands_nothing_on_to_its_attention_is_refused_before_its_first_step():
    engine = EngineSettings(sequence_parallel=2)
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8, attn_implementation="sdpa")
    check_attention(GPT2Model(config), engine)
    with pytest.raises(UserError, match=r"--sequence-parallel 2: SetInItsWays takes no keyword arguments"):
        check_attention(SetInItsWays(config), engine)


def test_layers_may_be_split_over_ranks_that_divide_their_heads_and_inner_size(model: str, tmp_path: Path):
    def check(model: str, size: int) -> None:
        check_parallelism(some_train_settings(model, engine=EngineSettings(tensor_parallel=size)), size)

    wide = a_config(tmp_path / "wide", model, num_attention_heads=4, num_key_value_heads=2)
    check(wide, 2)
    with pytest.raises(UserError, match=r"wide has heads for keys and values: 2, which have to be multiples of 4"):
        check(wide, 4)
    odd = a_config(tmp_path / "odd", wide, intermediate_size=129)
    with pytest.raises(UserError, match=r"odd has inner size: 129, which"):
        check(odd, 2)
    with pytest.raises(UserError, match="needs a number of ranks that is a multiple of 2, got 3"):
        check_parallelism(some_train_settings(wide, engine=EngineSettings(tensor_parallel=2)), 3)


def test_a_critic_that_is_split_otherwise_than_the_policy_is_refused(model: str, tmp_path: Path):
    wide = a_config(tmp_path / "wide", model, num_attention_heads=4, num_key_value_heads=2)
    LlamaConfig(num_attention_heads=4, num_key_value_heads=2).save_pretrained(tmp_path / "llama")
    critic = {"critic_model": str(tmp_path / "llama"), "advantage": "gae"}
    with pytest.raises(UserError, match="critic_model has to be of the same architecture as model"):
        check_parallelism(some_train_settings(wide, engine=EngineSettings(tensor_parallel=2), **critic), 2)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(), "transformers has no plan of how to split a gpt2"),
        (MixtralConfig(), "a mixtral splits layers.*, which is not supported"),
    ],
)
def test_a_model_that_nobody_says_how_to_split_is_refused(config: PreTrainedConfig, reason: str):
    with pytest.raises(UserError, match=reason):
        partition_config(config)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"zero_stage": 3}, "tensor_parallel 2 needs zero_stage 1 or 2, got 3"),
        ({"zero_stage": 0}, "tensor_parallel 2 needs zero_stage 1 or 2, got 0"),
        ({"lora": LoraSettings(rank=4, alpha=8.0)}, "tensor_parallel must be 1 with adapters, got 2"),
    ],
)
def test_what_does_not_go_together_with_split_layers_is_refused(overrides: dict[str, Any], reason: str):
    with pytest.raises(ValueError, match=reason):
        some_train_settings("m", engine=EngineSettings(tensor_parallel=2), **overrides)


def test_the_settings_of_a_run_refuse_it_before_ranks_are_started():
    with pytest.raises(ValueError, match="tensor_parallel must be 1 with lora_rank, got 2"):
        LearnerConfig(tensor_parallel=2, lora_rank=4)
    with pytest.raises(ValueError, match="tensor_parallel 2 needs zero_stage 1 or 2, got 3"):
        LearnerConfig(tensor_parallel=2, zero_stage=3)
    assert LearnerConfig(sequence_parallel=2).engine_settings.sequence_parallel == 2


def test_offloading_and_sequences_that_are_spread_do_not_go_together_with_split_layers():
    with pytest.raises(ValueError, match="tensor_parallel 2 needs offload none, got optimizer"):
        some_train_settings("m", engine=EngineSettings(tensor_parallel=2, offload="optimizer"))
    with pytest.raises(ValueError, match="sequence_parallel 2 and tensor_parallel 4 do not go together"):
        EngineSettings(sequence_parallel=2, tensor_parallel=4)


def test_fewer_than_one_rank_is_no_rank():
    with pytest.raises(ValueError, match="sequence_parallel must be at least 1, got 0"):
        EngineSettings(sequence_parallel=0)
