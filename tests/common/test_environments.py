"""What a person writes for --env, and what becomes of it."""

from pathlib import Path

import msgspec
import pytest

from common.config import ConfigError, parse_or_raise, write_resolved
from common.environments import Environments, EnvironmentSpec
from learner.config import LearnerConfig


def configured(*argv: str) -> LearnerConfig:
    return parse_or_raise(
        LearnerConfig, argv, program="learner", table="learner", known_tables=("learner", "rollout_server")
    )


def written(tmp_path: Path, text: str) -> LearnerConfig:
    (tmp_path / "run.toml").write_text(text)
    return configured("--config", str(tmp_path / "run.toml"))


TWO = """
[learner.environment.sums]
url = "reward+http://10.0.0.3:5000/get_reward"
replicas = ["reward+http://10.0.0.4:5000/get_reward"]
weight = 2
data = "sums.jsonl"
step_timeout_s = 60
[learner.environment.games]
url = "python:games:Game"
bad_action_reward = -1
"""


@pytest.mark.parametrize("flag", ["--env", "--environment"])
def test_a_url_is_one_environment_that_bears_its_name(flag):
    url = "python:my_rewards:score"
    assert configured(flag, url).environment == Environments((EnvironmentSpec(name=url, url=url),))


def test_a_table_holds_several_environments_each_with_its_weight_data_and_limits(tmp_path):
    sums, games = written(tmp_path, TWO).environment.specs
    assert (sums.name, sums.weight, sums.data, sums.step_timeout_s) == ("sums", 2.0, "sums.jsonl", 60.0)
    assert sums.replicas == ("reward+http://10.0.0.4:5000/get_reward",)
    assert (games.name, games.weight, games.data, games.bad_action_reward) == ("games", 1.0, "", -1.0)


@pytest.mark.parametrize("text", [TWO, '[learner]\nenvironment = "python:a:b"\n', ""])
def test_what_is_written_into_the_run_directory_reads_back_to_the_same(tmp_path, text):
    config = written(tmp_path, text)
    write_resolved(config, tmp_path / "resolved.toml", table="learner")
    assert configured("--config", str(tmp_path / "resolved.toml")) == config


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ("environment = 3", "must be a URL, or a table for each environment, got 3"),
        ("environment = {}", "must be a URL, or a table"),
        ('environment = ""', "length >= 1"),
        ("environment = {a = 3}", "a: must be a table with a url"),
        ("environment = {a = {weight = 1}}", "a: Object missing required field `url`"),
        (
            'environment = {a = {url = "x:", wait = 1}}',
            "a: Object contains unknown field `wait`; an environment's keys",
        ),
        ('environment = {a = {url = "x:", weight = 0}}', "a: Expected `float` > 0.0 - at `$.weight`"),
        ('environment = {a = {url = "x:", weight = nan}}', "a.weight must be a number, got nan"),
        ('environment = {a = {url = "x:", weight = inf}}', "a: Expected `float` <= 1000000.0"),
        ('environment = {a = {url = "x:", step_timeout_s = 0}}', "a: Expected `float` > 0.0"),
    ],
)
def test_a_mistake_names_the_environment_and_the_key(tmp_path, table, reason):
    with pytest.raises(ConfigError, match="environment: ") as refused:
        written(tmp_path, f"[learner]\n{table}\n")
    assert reason in str(refused.value)


def test_only_what_is_not_the_default_travels():
    spec = Environments.at("python:a:b").specs[0]
    assert msgspec.json.encode(spec) == b'{"name":"python:a:b","url":"python:a:b"}'
    assert msgspec.json.decode(msgspec.json.encode(spec), type=EnvironmentSpec) == spec


DOCS = Path(__file__).parents[2] / "docs"


def test_the_documentation_lists_every_key_with_its_default():
    text = (DOCS / "environments.md").read_text()
    for field in msgspec.structs.fields(EnvironmentSpec):
        if field.name != "name":
            assert f"`{field.name}`" in text
        if isinstance(field.default, int | float) and field.name != "weight":
            assert f"`{field.name}` | {field.default:g} |" in text.replace("4194304", f"{4 << 20:g}")


def test_the_server_in_the_documentation_is_the_one_that_is_tested():
    server = (DOCS / "openenv_server.py").read_text()
    assert f"```python\n{server}```" in (DOCS / "environments.md").read_text()
    assert len(server.splitlines()) < 60
