import dataclasses
import math
import tomllib
from pathlib import Path

import pytest

from common.config import ConfigError, parse_or_raise, write_resolved
from learner.__main__ import KNOWN_TABLES, parse_learner
from learner.config import LearnerConfig
from learner.config_checks import COUNTS


def parsed(*argv: str) -> LearnerConfig:
    return parse_or_raise(LearnerConfig, argv, program="learner", table="learner", known_tables=KNOWN_TABLES)


def test_the_defaults_are_a_run_that_is_possible():
    assert parsed() == LearnerConfig()


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3])
def test_a_count_below_one_is_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {value}"):
        LearnerConfig(**{name: value})


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_staleness": -1}, "max_staleness must be >= 0, got -1; 0 means strictly on-policy"),
        ({"warmup_steps": -1}, "warmup_steps must be finite and >= 0, got -1"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0; a greedy policy explores nothing"),
        ({"temperature": math.nan}, "temperature must be finite and > 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and > 0, got inf"),
        ({"learning_rate": -1e-6}, "learning_rate must be finite and >= 0, got -1e-06"),
        ({"learning_rate": math.nan}, "learning_rate must be finite and >= 0, got nan"),
        ({"critic_learning_rate": math.inf}, "critic_learning_rate must be finite and >= 0, got inf"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and >= 0, got -0.1"),
        ({"canary_every": -1}, "canary_every must be >= 0, got -1; 0 means never"),
        ({"relay_weights": 1}, "relay_weights must be from 2 to 1024, got 1; 0 is for none"),
        ({"relay_weights": 1025}, "relay_weights must be from 2 to 1024, got 1025; 0 is for none"),
        ({"canary_tolerance": math.inf}, "canary_tolerance must be finite and > 0, got inf"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be finite and > 0, got 0.0"),
        ({"server_timeout_s": 0.0}, "server_timeout_s must be finite and > 0, got 0.0"),
        ({"adam_beta1": 1.0}, "adam_beta1 must be at least 0 and less than 1, got 1.0"),
        ({"adam_epsilon": 0.0}, "adam_epsilon must be finite and > 0, got 0.0"),
        ({"adam_beta2": math.nan}, "adam_beta2 must be at least 0 and less than 1, got nan"),
        ({"max_model_len": 0}, "max_model_len must be at least 2, got 0"),
        ({"max_model_len": 256}, "max_new_tokens 256 leaves no room for a prompt within max_model_len 256"),
        ({"group_size": 1}, "group_size 1 leaves grpo nothing to compare with"),
        ({"group_size": 1, "advantage": "rloo"}, "group_size 1 leaves rloo nothing to compare with"),
        ({"kl_coefficient": -1.0}, "kl_coefficient must be finite and >= 0, got -1.0"),
        ({"kl_target": 6.0}, "kl_target multiplies kl_coefficient, which is 0"),
        ({"kl_coefficient": 0.1, "kl_estimator": "k1"}, "kl_estimator k1 in the loss has a gradient that does not"),
        ({"reference_offload": True}, "reference_offload: there is no reference; set kl_coefficient or"),
        ({"overlong_buffer": 300}, "overlong_buffer must be at most overlong_length 256, got 300"),
        ({"overlong_length": 0}, "overlong_length and overlong_penalty punish nothing while overlong_buffer is 0"),
        ({"reward_clip": -1.0}, "reward_clip must be finite and > 0, got -1.0"),
        ({"drop_equal_groups": True, "advantage": "gae"}, "drop_equal_groups: with advantage gae a group of equal"),
        ({"dynamic_sampling": -1}, "dynamic_sampling must be >= 0, got -1; 0 filters nothing"),
        ({"dynamic_sampling": 8, "advantage": "gae"}, "dynamic_sampling: with advantage gae a group of equal"),
        ({"evaluate_every_steps": -1}, "evaluate_every_steps must be >= 0, got -1; 0 means never"),
        ({"evaluate_every_steps": 1, "evaluation_tasks": 0}, "evaluation_tasks must be from 1 to 65536, got 0"),
        ({"evaluate_every_steps": 1, "evaluation_samples": 0}, "evaluation_samples must be from 1 to 4096, got 0"),
        (
            {"evaluate_every_steps": 1, "evaluation_tasks": 1 << 16, "evaluation_samples": 17},
            "evaluation_tasks times evaluation_samples must be at most 1048576, got 1114112",
        ),
        (
            {"evaluate_every_steps": 1, "evaluation_temperature": -1.0},
            "evaluation_temperature must be from 0 to 100, got -1.0",
        ),
        (
            {"evaluate_every_steps": 1, "evaluation_samples": 2, "evaluation_temperature": 0.0},
            "evaluation_samples 2 at evaluation_temperature 0 gives episodes that are the same; it must be",
        ),
        ({"evaluate_every_steps": 1, "evaluation_pass_reward": math.nan}, "evaluation_pass_reward must be finite"),
        ({"evaluate_every_steps": 1, "evaluation_hold_s": -1.0}, "evaluation_hold_s must be finite and >= 0, got -1"),
        ({"evaluate_every_steps": 1, "evaluation_timeout_s": 0.0}, "evaluation_timeout_s must be finite and > 0"),
        ({"group_size": 5000}, "group_size must be at most 4096, got 5000"),
        ({"dtype": "bfloat16", "zero_stage": 0}, "dtype bfloat16 needs zero_stage 1, 2 or 3"),
        ({"queue_groups": 15}, "queue_groups 15 can never hold a batch of groups_per_step 16"),
        ({"queue_groups": 0}, "queue_groups 0 can never hold a batch of groups_per_step 16"),
        ({"queue_bytes": 1000}, "queue_bytes 1000 can never hold a batch: 16 groups of up to"),
    ],
)
def test_an_impossible_value_is_refused_with_a_sentence(settings, sentence):
    with pytest.raises(
        ValueError, match=r"must|needs|leaves|can never|multiplies|has a gradient|there is no|punish"
    ) as refusal:
        LearnerConfig(**settings)
    assert str(refusal.value).startswith(sentence)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--zero-stage", "4"], "--zero-stage must be one of 0, 1, 2, 3; got 4"),
        (["--dtype", "float16"], "--dtype must be one of float32, bfloat16; got 'float16'"),
        (["--lr-schedule", "step"], "--lr-schedule must be one of constant, linear, cosine; got 'step'"),
        (["--total-steps", "1.5"], "--total-steps must be a whole number, got '1.5'"),
        (["--temperature", "hot"], "--temperature must be a number, got 'hot'"),
        (["--kl-in", "advantage"], "--kl-in must be one of loss, reward; got 'advantage'"),
        (["--kl-estimator", "k4"], "--kl-estimator must be one of k1, k2, k3; got 'k4'"),
        (["--reward-normalization", "z"], "--reward-normalization must be one of none, batch, running; got 'z'"),
        (["--loss-setting", "clip"], "--loss-setting takes NAME=NUMBER, got 'clip'"),
    ],
)
def test_a_flag_of_the_wrong_kind_is_refused_with_a_sentence(argv, sentence):
    with pytest.raises(ConfigError) as refusal:
        parsed(*argv)
    assert str(refusal.value) == sentence


@pytest.mark.parametrize("advantage", ["gae", "reinforce", "reinforce_plus_plus"])
def test_a_group_of_one_is_possible_where_nothing_is_compared_within_groups(advantage):
    assert LearnerConfig(group_size=1, advantage=advantage).group_size == 1


def test_the_penalty_for_length_is_complete_at_the_longest_completion_unless_told_otherwise():
    assert LearnerConfig(overlong_buffer=10, max_new_tokens=100).reward_settings.overlong_length == 100
    assert LearnerConfig(overlong_buffer=10, overlong_length=50).reward_settings.overlong_length == 50
    assert LearnerConfig().reward_settings.overlong_length is None


def test_the_queue_holds_what_the_staleness_allows_unless_told_otherwise():
    assert LearnerConfig(max_staleness=0, groups_per_step=4).queue_capacity == 8
    assert LearnerConfig(max_staleness=3, groups_per_step=4).queue_capacity == 20
    assert LearnerConfig(queue_groups=17).queue_capacity == 17


def test_the_resolved_configuration_is_read_back_equal(tmp_path):
    config = LearnerConfig(
        model="m",
        advantage="gae",
        loss_setting={"clip_ratio": 0.1},
        run_dir=Path("some") / "run",
        max_model_len=512,
        kl_coefficient=0.1,
        kl_in="reward",
        kl_estimator="k3",
        reward_clip=2.0,
        drop_truncated=True,
    )
    write_resolved(config, tmp_path / "learner.toml", table="learner")
    assert parsed("--config", str(tmp_path / "learner.toml")) == config
    assert tomllib.loads((tmp_path / "learner.toml").read_text())["learner"]["group_size"] == 16


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_learner(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(LearnerConfig):
        assert "--" + field.name.replace("_", "-") in text


def test_a_mistake_ends_the_command_with_the_sentence_and_exit_code_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_learner(["--max-staleness", "-1"])
    assert capsys.readouterr().err == "learner: max_staleness must be >= 0, got -1; 0 means strictly on-policy\n"
