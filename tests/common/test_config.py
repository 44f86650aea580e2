"""One declaration gives flag, TOML key, default and help; every mistake is one sentence."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from common.config import ConfigError, option, parse, parse_or_raise, write_resolved

TABLES = ("learner", "rollout_server")


@dataclass(frozen=True, slots=True, kw_only=True)
class AConfig:
    """Train a policy.

    It waits until a server has joined,
    and goes on.
    """

    model: str = option(help="policy to train")
    max_staleness: int = option(2, help="oldest token that may be trained; 100 % is fresh at 0")
    temperature: float = option(1.0, help="of sampling")
    tensorboard: bool = option(True, help="write logs")
    run_dir: Path = option(Path("runs"), help="where the run goes")
    max_model_len: int | None = option(None, help="longest sequence")
    metrics_listen: str | None = option("127.0.0.1:0", help="empty for none")
    schedule: Literal["constant", "cosine"] = option("constant", help="of the learning rate")
    zero_stage: Literal[0, 1, 2] = option(1, help="of ZeRO")
    tags: tuple[str, ...] = option((), help="names for it; may be repeated")
    loss_setting: dict[str, float] = option(dict, help="of the loss; may be repeated")

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must be >= 0, got {self.max_staleness}")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where run.toml is written; named as a user in that directory names it."""
    monkeypatch.chdir(tmp_path)
    return Path("run.toml")


def parsed(*argv: str) -> AConfig:
    return parse_or_raise(AConfig, argv, program="learner", table="learner", known_tables=TABLES)


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as refused:
        parsed(*argv)
    return str(refused.value)


def test_a_setting_that_nobody_gave_has_its_default():
    assert parsed("--model", "m") == AConfig(model="m")


def test_every_kind_of_setting_can_be_given_as_a_flag():
    config = parsed(
        "--model", "m", "--max-staleness", "-0", "--temperature", "1e-1", "--no-tensorboard", "--run-dir", "here",
        "--max-model-len", "512", "--metrics-listen", "", "--schedule", "cosine", "--zero-stage", "2",
        "--tags", "a", "--tags", "b", "--loss-setting", "clip-ratio=0.1", "--loss-setting", "entropy_bonus = 1",
    )  # fmt: skip
    assert config == AConfig(
        model="m", max_staleness=0, temperature=0.1, tensorboard=False, run_dir=Path("here"), max_model_len=512,
        metrics_listen=None, schedule="cosine", zero_stage=2, tags=("a", "b"),
        loss_setting={"clip_ratio": 0.1, "entropy_bonus": 1.0},
    )  # fmt: skip


def test_every_kind_of_setting_can_be_given_in_the_file(file: Path):
    file.write_text("""
[learner]
model = "m"
max_staleness = 0
temperature = 1
tensorboard = false
run_dir = "here"
max_model_len = 512
metrics_listen = ""
schedule = "cosine"
zero_stage = 2
tags = ["a", "b"]
[learner.loss_setting]
clip_ratio = 0.1
entropy_bonus = 1
""")
    config = parsed("--config", "run.toml")
    assert config == AConfig(
        model="m", max_staleness=0, temperature=1.0, tensorboard=False, run_dir=Path("here"), max_model_len=512,
        metrics_listen=None, schedule="cosine", zero_stage=2, tags=("a", "b"),
        loss_setting={"clip_ratio": 0.1, "entropy_bonus": 1.0},
    )  # fmt: skip
    assert isinstance(config.temperature, float)


def test_a_flag_beats_the_file_and_the_file_beats_the_default(file: Path):
    file.write_text("[learner]\nmodel = 'from-file'\nmax_staleness = 1\ntensorboard = false\ntags = ['file']\n")
    config = parsed("--config", "run.toml", "--max-staleness", "0", "--tags", "flag", "--tensorboard")
    assert (config.model, config.max_staleness, config.tags, config.tensorboard) == ("from-file", 0, ("flag",), True)


def test_a_pair_given_as_a_flag_leaves_the_other_pairs_of_the_file(file: Path):
    file.write_text("[learner]\nmodel = 'm'\nloss_setting = {clip_ratio = 0.2, entropy_bonus = 0.5}\n")
    assert parsed("--config", "run.toml", "--loss-setting", "clip_ratio=0.1").loss_setting == {
        "clip_ratio": 0.1,
        "entropy_bonus": 0.5,
    }


def test_the_tables_of_other_processes_are_left_to_them(file: Path):
    file.write_text("[rollout_server]\nanything = 1\n[learner]\nmodel = 'm'\n")
    assert parsed("--config", "run.toml") == AConfig(model="m")
    file.write_text("[rollout_server]\nanything = 1\n")
    assert parsed("--config", "run.toml", "--model", "m") == AConfig(model="m")


KNOWN_KEYS = (
    "loss_setting, max_model_len, max_staleness, metrics_listen, model, run_dir, schedule, tags, temperature, "
    "tensorboard, zero_stage"
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[learner]\nmax_stalenes = 1",
            f"run.toml: unknown key max_stalenes in [learner]; did you mean max_staleness? known: {KNOWN_KEYS}",
        ),
        ("[learner]\nxyz = 1", f"run.toml: unknown key xyz in [learner]; known: {KNOWN_KEYS}"),
        ("[lerner]", "run.toml: unknown table [lerner]; did you mean learner? known: learner, rollout_server"),
        ("max_staleness = 1", "run.toml: max_staleness stands outside of a table; write it below [learner]"),
        ("[[learner]]", "run.toml: learner stands outside of a table; write it below [learner]"),
        ("[learner]\nmax_staleness = 'two'", "run.toml: max_staleness must be a whole number, got 'two'"),
        ("[learner]\nmax_staleness = '2'", "run.toml: max_staleness must be a whole number, got '2'"),
        ("[learner]\nmax_staleness = 2.0", "run.toml: max_staleness must be a whole number, got 2.0"),
        ("[learner]\nmax_staleness = true", "run.toml: max_staleness must be a whole number, got True"),
        ("[learner]\ntemperature = true", "run.toml: temperature must be a number, got True"),
        ("[learner]\ntemperature = nan", "run.toml: temperature must be a number, got nan"),
        ("[learner]\ntemperature = '1'", "run.toml: temperature must be a number, got '1'"),
        (f"[learner]\ntemperature = 1{'0' * 400}", f"run.toml: temperature must be a number, got 1{'0' * 400}"),
        ("[learner]\ntensorboard = 1", "run.toml: tensorboard must be true or false, got 1"),
        ("[learner]\nmodel = 5", "run.toml: model must be text, got 5"),
        ("[learner]\nrun_dir = 5", "run.toml: run_dir must be a path, got 5"),
        ("[learner]\nrun_dir = ''", "run.toml: run_dir must be a path, got ''"),
        ("[learner]\nschedule = 'linear'", "run.toml: schedule must be one of constant, cosine; got 'linear'"),
        ("[learner]\nzero_stage = 3", "run.toml: zero_stage must be one of 0, 1, 2; got 3"),
        ("[learner]\nzero_stage = true", "run.toml: zero_stage must be a whole number, got True"),
        ("[learner]\ntags = 'a'", "run.toml: tags must be a list of texts, got 'a'"),
        ("[learner]\ntags = [1]", "run.toml: tags must be a list of texts, got [1]"),
        ("[learner]\nloss_setting = 1", "run.toml: loss_setting must be a table of numbers, got 1"),
        ("[learner]\nloss_setting = {a = 'b'}", "run.toml: loss_setting must be a table of numbers, got {'a': 'b'}"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_value_and_what_is_known(file: Path, text: str, sentence: str):
    file.write_text(text)
    assert refusal("--config", "run.toml") == sentence


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--max-stalenes", "1"], "unknown flag --max-stalenes; did you mean --max-staleness? learner --help lists"),
        (["--max-stalenes=1"], "unknown flag --max-stalenes; did you mean --max-staleness? learner --help lists"),
        (["--max-stale", "1"], "unknown flag --max-stale;"),
        (["run.toml"], "unknown flag run.toml; learner --help lists"),
        (["--max-staleness"], "argument --max-staleness: expected one argument; learner --help lists"),
        (["--max-staleness", "two"], "--max-staleness must be a whole number, got 'two'"),
        (["--max-staleness", ""], "--max-staleness must be a whole number, got ''"),
        (["--temperature", "hot"], "--temperature must be a number, got 'hot'"),
        (["--temperature", "nan"], "--temperature must be a number, got nan"),
        (["--run-dir", ""], "--run-dir must be a path, got ''"),
        (["--schedule", "linear"], "--schedule must be one of constant, cosine; got 'linear'"),
        (["--loss-setting", "clip_ratio"], "--loss-setting takes NAME=NUMBER, got 'clip_ratio'"),
        (["--loss-setting", "clip_ratio=x"], "--loss-setting takes NAME=NUMBER, got 'clip_ratio=x'"),
        (["--loss-setting", " =1"], "--loss-setting takes NAME=NUMBER, got ' =1'"),
    ],
)
def test_a_mistake_in_a_flag_is_named_with_its_value(flags: list[str], sentence: str):
    assert refusal("--model", "m", *flags).startswith(sentence)


def test_a_setting_without_default_must_be_given():
    assert refusal() == "--model must be given; learner --help says what it is"


def test_a_value_that_the_settings_together_refuse_is_a_mistake_like_any_other():
    assert refusal("--model", "m", "--max-staleness", "-1") == "max_staleness must be >= 0, got -1"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "--config run.toml: No such file or directory"),
        (b"[learner", "--config run.toml is not TOML: "),
        (b"\xff\xfe", "--config run.toml is not TOML: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named(file: Path, content: bytes | None, sentence: str):
    if content is not None:
        file.write_bytes(content)
    assert refusal("--config", "run.toml").startswith(sentence)


def test_a_mistake_ends_the_program_with_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ending:
        parse(AConfig, ["--temperature", "hot"], program="learner", table="learner", known_tables=TABLES)
    assert ending.value.code == 2
    assert capsys.readouterr().err == "learner: --temperature must be a number, got 'hot'\n"


def test_help_teaches_every_setting_with_its_default(capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ending:
        parse(
            AConfig, ["--help"], program="learner", table="learner", known_tables=TABLES, epilog="examples:\n  learner"
        )
    assert ending.value.code == 0
    assert (
        capsys.readouterr().out
        == """\
usage: learner --model TEXT [--config FILE] [flags]

Train a policy.

It waits until a server has joined,
and goes on.

options:
  -h, --help            show this help message and exit
  --config FILE         TOML file; its table [learner] holds any of the settings below
  --model TEXT          policy to train (required)
  --max-staleness N     oldest token that may be trained; 100 % is fresh at 0 (default: 2)
  --temperature X       of sampling (default: 1.0)
  --tensorboard, --no-tensorboard
                        write logs (default: on)
  --run-dir PATH        where the run goes (default: runs)
  --max-model-len N     longest sequence
  --metrics-listen TEXT
                        empty for none (default: 127.0.0.1:0)
  --schedule constant|cosine
                        of the learning rate (default: constant)
  --zero-stage 0|1|2    of ZeRO (default: 1)
  --tags TEXT           names for it; may be repeated
  --loss-setting NAME=NUMBER
                        of the loss; may be repeated

examples:
  learner
"""
    )


def some_configs() -> st.SearchStrategy[AConfig]:
    numbers = st.floats(allow_nan=False)
    return st.builds(
        AConfig,
        model=st.text(),
        max_staleness=st.integers(min_value=0),
        temperature=numbers,
        tensorboard=st.booleans(),
        run_dir=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(Path),
        max_model_len=st.none() | st.integers(),
        metrics_listen=st.none() | st.text(min_size=1),  # empty text is how none is written
        schedule=st.sampled_from(["constant", "cosine"]),
        zero_stage=st.sampled_from([0, 1, 2]),
        tags=st.lists(st.text()).map(tuple),
        loss_setting=st.dictionaries(st.text(), numbers),
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=some_configs())
@example(config=AConfig(model='quote " backslash \\ \x00\x7f\u0085\u2028 😀', loss_setting={"😀\n": float("inf")}))
@example(config=AConfig(model="m", metrics_listen=None, temperature=1e-7))
def test_what_is_written_beside_a_run_reads_back_as_the_same_configuration(config: AConfig, tmp_path: Path):
    path = tmp_path / "resolved.toml"
    write_resolved(config, path, table="learner")
    again = parsed("--config", str(path))
    assert again == config
    assert [type(value) for value in values_of(again)] == [type(value) for value in values_of(config)]


def values_of(config: AConfig) -> list[Any]:
    return [getattr(config, field.name) for field in dataclasses.fields(config)]
