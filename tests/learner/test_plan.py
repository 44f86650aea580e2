import pytest

from common.lifecycle import UserError
from learner import plan
from learner.config import LearnerConfig
from learner.demo import model as demo_model
from learner.reward_settings import KlSettings, RewardSettings
from learner.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(path=tmp_path, run_id="abc", lineage=2, private=tmp_path / "private")


def test_the_model_that_was_asked_for_is_trained(run):
    assert plan.model_of(LearnerConfig(model="some/model"), run) == "some/model"


def test_the_demo_model_is_made_once_and_a_half_made_one_is_made_anew(run, monkeypatch):
    made: list[int] = []

    def build(directory, *, seed):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        made.append(seed)
        if len(made) == 1:
            raise KeyboardInterrupt
        (directory / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(demo_model, "build_demo_model", build)
    config = LearnerConfig(seed=7)
    with pytest.raises(KeyboardInterrupt):
        plan.model_of(config, run)
    for _ in range(2):
        assert plan.model_of(config, run) == str(run.path / "demo-model")
    assert made == [7, 7]
    assert sorted(path.name for path in (run.path / "demo-model").iterdir()) == ["config.json", "tokenizer.json"]


def test_the_settings_of_training_are_those_of_the_configuration():
    config = LearnerConfig(
        adam_beta1=0.5,
        adam_epsilon=1e-5,
        temperature=0.7,
        max_staleness=3,
        loss_setting={"clip_ratio": 0.1},
        zero_stage=2,
    )
    settings = plan.train_settings(config, "m")
    assert (settings.adam_betas, settings.temperature, settings.max_staleness) == ((0.5, 0.95), 0.7, 3)
    assert settings.adam_epsilon == 1e-5
    assert (settings.loss_settings, settings.zero_stage, settings.critic_model) == ({"clip_ratio": 0.1}, 2, None)


@pytest.mark.parametrize(("max_staleness", "beta1"), [(0, 0.9), (1, 0.8), (2, 0.7), (8, 0.1), (9, 0.0), (64, 0.0)])
def test_the_older_data_may_be_the_less_momentum_is_added_to_it(max_staleness, beta1):
    assert plan.train_settings(LearnerConfig(max_staleness=max_staleness), "m").adam_betas == (beta1, 0.95)


def test_momentum_may_be_chosen_all_the_same():
    assert plan.train_settings(LearnerConfig(max_staleness=8, adam_beta1=0.9), "m").adam_betas == (0.9, 0.95)


def test_a_critic_starts_from_the_model_unless_told_otherwise():
    assert plan.train_settings(LearnerConfig(advantage="gae"), "m").critic_model == "m"
    assert plan.train_settings(LearnerConfig(advantage="gae", critic_model="c"), "m").critic_model == "c"


def test_the_reference_is_the_model_unless_told_otherwise_and_nothing_where_it_costs_nothing():
    def reference(**settings):
        return plan.train_settings(LearnerConfig(**settings), "m").kl.reference_model

    assert reference() is None
    assert reference(kl_coefficient=0.1) == "m"
    assert reference(kl_coefficient=0.1, reference_model="r") == reference(reference_model="r") == "r"


def test_rewards_and_kl_reach_the_training_settings():
    config = LearnerConfig(
        kl_coefficient=0.1, kl_in="reward", kl_estimator="k2", kl_target=6.0, reference_offload=True,
        overlong_buffer=5, overlong_length=9, overlong_penalty=2.0, reward_normalization="running", reward_clip=3.0,
        drop_equal_groups=True, drop_truncated=True,
    )  # fmt: skip
    settings = plan.train_settings(config, "m")
    assert settings.kl == KlSettings(
        coefficient=0.1, place="reward", estimator="k2", target=6.0, reference_model="m", reference_offload=True
    )
    assert settings.rewards == RewardSettings(
        overlong_buffer=5, overlong_length=9, overlong_penalty=2.0, normalization="running", clip=3.0,
        drop_equal_groups=True, drop_truncated=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "trpo"}, "unknown loss trpo; known: cispo, decoupled_ppo, dppo, "),
        ({"advantage": "td"}, "unknown advantage td; known: dr_grpo, gae, grpo, reinforce"),
        ({"loss_setting": {"clip": 0.1}}, "decoupled_ppo has no setting clip; it takes: clip_ratio"),
        ({"advantage_setting": {"gamma": 0.9}}, "grpo has no setting gamma; it takes: normalize_std, epsilon"),
        (
            {"advantage": "gae", "advantage_setting": {"gae_lambda": 2.0}},
            "gae_lambda of gae must be >= 0 and <= 1, got 2.0",
        ),
    ],
)
def test_an_algorithm_or_a_setting_that_does_not_exist_is_refused_before_any_model_is_loaded(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        plan.train_settings(LearnerConfig(**settings), "no model")


def test_the_coordinator_is_told_the_bounds_and_names_of_this_lineage(run):
    config = LearnerConfig(max_staleness=1, groups_per_step=4, listen="tcp://127.0.0.1:5557", dynamic_sampling=16)
    settings = plan.coordinator_settings(config, plan.train_settings(config, "m"), run, None)
    assert (settings.run_id, settings.model, settings.keys) == ("abc.2", "m", "")
    assert (settings.rules.queue_groups, settings.rules.max_group_bytes) == (12, config.max_group_bytes)
    assert settings.rules.max_filtered == 16
    assert settings.event_log == str(run.path / "events-coordinator-2.jsonl")
    assert settings.learner_socket == f"ipc://{run.private}/coordinator"
