"""What the learner says of its own parameters, and of which versions it says it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.canary import TOLERANCES, canary_prompt
from learner.canary import LARGE_MODEL_EVERY, CanaryMaker, default_canary_every
from learner.torch_engine import open_torch_engine
from tests.builders_learner import a_batch, random_groups, some_train_settings, weights_of
from tests.models import VOCAB_SIZE, forward_logprobs, save_tiny_model

PROMPT = canary_prompt(VOCAB_SIZE, 1024)


def engine_at(version: int, logprob: float = -1.0) -> SimpleNamespace:
    return SimpleNamespace(version=version, token_logprobs=lambda ids: np.full(ids.size - 1, logprob, np.float32))


def test_a_canary_is_the_log_probabilities_of_the_parameters_at_temperature_1_and_changes_nothing(tmp_path):
    engine = open_torch_engine(some_train_settings(str(save_tiny_model(tmp_path, tied=True)), temperature=0.7))
    maker = CanaryMaker(every=1, prompt=PROMPT, dtype="float32")
    for version in range(2):
        before, random_state = weights_of(engine), torch.get_rng_state()
        canary = maker.make(engine)
        assert engine.version == version
        assert canary.token_ids == tuple(PROMPT.tolist())
        assert canary.distance(forward_logprobs(engine._network.model, PROMPT)) < 1e-5
        assert all(torch.equal(weight, before[name]) for name, weight in weights_of(engine).items())
        assert all(
            parameter.grad is None or not parameter.grad.any() for parameter in engine._network.model.parameters()
        )
        assert torch.equal(torch.get_rng_state(), random_state)
        engine.step(a_batch(random_groups(version), version=version))


def test_every_so_many_versions_carry_one_and_the_first_of_a_resumed_learner_does_whatever_its_number():
    maker = CanaryMaker(every=5, prompt=PROMPT, dtype="float32")
    assert [version for version in range(13, 26) if maker.make(engine_at(version))] == [13, 15, 20, 25]


def test_none_is_made_where_it_is_turned_off_or_has_no_room():
    assert CanaryMaker(every=0, prompt=PROMPT, dtype="float32").make(engine_at(0)) is None
    assert CanaryMaker(every=1, prompt=canary_prompt(100, 2), dtype="float32").make(engine_at(0)) is None


def test_the_tolerance_is_that_of_the_type_unless_one_is_given():
    assert CanaryMaker(every=1, prompt=PROMPT, dtype="bfloat16").make(engine_at(0)).tolerance == TOLERANCES["bfloat16"]
    maker = CanaryMaker(every=1, prompt=PROMPT, dtype="bfloat16", tolerance=0.5)
    assert maker.make(engine_at(0)).tolerance == 0.5


def test_parameters_that_give_no_finite_numbers_have_no_canary_and_it_is_said(caplog):
    assert CanaryMaker(every=1, prompt=PROMPT, dtype="float32").make(engine_at(7, np.nan)) is None
    assert "version 7 gives its canary no finite log-probabilities" in caplog.text


@pytest.mark.parametrize(("num_parameters", "every"), [(300_000, 1), (1_700_000_000, 1), (70e9, LARGE_MODEL_EVERY)])
def test_large_models_carry_one_less_often(num_parameters, every):
    assert default_canary_every(int(num_parameters)) == every
