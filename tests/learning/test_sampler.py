"""The harness of `make learn` imposes staleness as it says: each token is sampled by the version it carries."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.trajectory import FinishReason
from learner.__main__ import parse_learner
from learner.config import LearnerConfig
from learner.demo.model import build_demo_model
from learner.demo.task import reward, training_prompts
from learner.objective import PolicyObjective
from learner.plan import train_settings
from tests.learning import run as learning_run
from tests.learning.campaign import STALENESS, Run, flags_of, load, planned
from tests.learning.sampler import PastPolicies, batches
from tests.models import forward_logprobs

MAX_STALENESS, LAST_VERSION = 2, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "demo"
    build_demo_model(directory)
    return directory


@pytest.fixture(scope="module")
def versions(model) -> list[torch.nn.Module]:
    """Far enough from each other for their log-probabilities to tell them apart."""
    policies = [AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval() for _ in range(4)]
    for version, policy in enumerate(policies):
        generator = torch.Generator().manual_seed(version)
        for parameter in policy.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    return policies


@pytest.fixture(scope="module")
def groups(model, versions):
    policies = PastPolicies(str(model), max_staleness=MAX_STALENESS, max_new_tokens=8, temperature=0.9, seed=0)
    for version in versions:
        policies.push([(name, each.data) for name, each in version.named_parameters()])
    rows = next(batches(training_prompts, 32))
    return rows, policies.sample(rows, 4, reward)


def test_every_token_has_the_log_probability_that_its_version_gives_it(versions, groups):
    for group in groups[1]:
        for trajectory in group.trajectories:
            by_version = [forward_logprobs(version, trajectory.token_ids, temperature=0.9) for version in versions]
            for place in np.flatnonzero(trajectory.loss_mask):
                expected = by_version[trajectory.token_versions[place]][place - 1]
                assert trajectory.behavior_logprobs[place] == pytest.approx(expected, abs=1e-5)


def test_tokens_are_as_old_as_they_may_be_or_one_step_younger(groups):
    ages = np.concatenate(
        [LAST_VERSION - each.token_versions[each.loss_mask] for group in groups[1] for each in group.trajectories]
    )
    assert set(ages.tolist()) == {MAX_STALENESS, MAX_STALENESS - 1}
    assert 0.4 < (ages == MAX_STALENESS).mean() < 0.8  # the first tokens of a completion are the older ones
    assert all((np.diff(each.token_versions[5:]) >= 0).all() for group in groups[1] for each in group.trajectories)


def test_completions_end_as_a_server_ends_them_and_are_scored(groups):
    rows, sampled = groups
    for row, group in zip(rows, sampled, strict=True):
        for trajectory in group.trajectories:
            is_done = trajectory.finish_reason is FinishReason.TERMINATED
            assert is_done == (trajectory.token_ids[-1] == 1)
            assert trajectory.num_sampled_tokens <= 8
            assert 0.0 <= trajectory.reward <= 1.0
        assert len({trajectory.token_ids[:5].tobytes() for trajectory in group.trajectories}) == 1, row


def test_a_run_that_was_made_with_other_settings_is_made_again(tmp_path):
    run = Run("corrected", 2, 0)
    assert load(tmp_path, run, ()) is None
    (tmp_path / run.file).write_text(json.dumps({"flags": list(flags_of(run, ())), "steps": []}))
    assert load(tmp_path, run, ()) is not None
    assert load(tmp_path, run, ("--total-steps", "10")) is None


@pytest.mark.parametrize("max_staleness", STALENESS)
def test_the_corrected_runs_are_those_of_a_learner_to_which_nothing_else_is_said(max_staleness):
    told = parse_learner([*flags_of(Run("corrected", max_staleness, 0), ())])
    untold = parse_learner(["--max-staleness", str(max_staleness)])
    assert repr(objective_of(told)) == repr(objective_of(untold))
    assert told.adam_betas == untold.adam_betas


def objective_of(config: LearnerConfig) -> PolicyObjective:
    return PolicyObjective(train_settings(config, "m"))


def test_at_staleness_0_there_is_nothing_to_correct():
    runs = planned(5)
    assert len(runs) == 45
    assert {run.arm for run in runs if run.max_staleness == 0} == {"corrected"}


def test_a_run_trains_on_what_past_policies_sampled_and_is_measured(model, monkeypatch):
    monkeypatch.setattr(learning_run, "EVALUATION_ROWS", 4)
    monkeypatch.setattr(learning_run, "EVALUATE_EVERY_STEPS", 1)
    config = parse_learner(["--config", str(learning_run.CONFIG), "--total-steps", "2", "--max-staleness", "1"])
    result = learning_run.learn(config, str(model))
    assert [step["step"] for step in result["steps"]] == [1, 2]
    assert [evaluation["version"] for evaluation in result["evaluations"]] == [0, 1, 2]
    assert result["steps"][1]["grad_norm"] > 0
