"""Which ranks may share what: refused before anything large is loaded."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.parallelism import check_parallelism
from learner.reward_settings import KlSettings
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


def test_fewer_than_one_rank_is_no_rank():
    with pytest.raises(ValueError, match="sequence_parallel must be at least 1, got 0"):
        EngineSettings(sequence_parallel=0)
