"""docs/algorithms.md says what there is, as it is, and nothing that there is not."""

import re
import shlex
from pathlib import Path

import pytest

from common.config import parse_or_raise
from common.setting import settings_of as options_of
from learner.algorithms import (
    ADVANTAGES,
    AGGREGATIONS,
    CORRECTIONS,
    LOSSES,
    build_advantages,
    build_aggregation,
    build_corrections,
    build_loss,
)
from learner.algorithms.settings import declared_settings, settings_of
from learner.config import LearnerConfig
from learner.step_metrics import STEP_METRICS

PAGE = (Path(__file__).parents[3] / "docs" / "algorithms.md").read_text()
OPTIONS = {option.name: option for option in options_of(LearnerConfig)}
TABLES = {"Losses": LOSSES, "Corrections": CORRECTIONS, "Aggregations": AGGREGATIONS, "Advantages": ADVANTAGES}
BESIDE = {"critic_model", "critic_learning_rate", "critic_warmup_steps", "on_nonfinite", "max_skipped_steps"}
"""Options of algorithms that LearnerConfig declares elsewhere than between loss and learning_rate."""
ADVICE = PAGE[: PAGE.index("## Three policies")].replace("\\\n", "")
COMMANDS = re.findall(r"`(--[^`]+)`|^learner (--.*)", ADVICE, re.MULTILINE)


def section(title: str, *, level: int, text: str = PAGE) -> str:
    """What stands below a heading, up to the next one that is as high."""
    mark = "#" * level
    [found] = re.findall(rf"^{mark} {re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(found)


def rows(text: str) -> list[tuple[str, ...]]:
    """The cells of each row of its tables, but for their headings and lines."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]) for line in lines]


@pytest.mark.parametrize("title", TABLES)
def test_a_kind_of_algorithm_has_a_section_for_each_that_exists_and_for_no_other(title):
    assert set(re.findall(r"^### `(\w+)`$", section(title, level=2), re.MULTILINE)) == TABLES[title].keys()


@pytest.mark.parametrize(("title", "name"), [(title, name) for title, table in TABLES.items() for name in table])
def test_an_algorithm_is_described_with_its_settings_their_defaults_bounds_and_papers(title, name):
    text, function = section(f"`{name}`", level=3, text=section(title, level=2)), TABLES[title][name]
    declared = declared_settings(function)
    assert rows(text) == [
        (f"`{setting}`", f"{default:g}", declared[setting].range, declared[setting].help)
        for setting, default in settings_of(function).items()
    ]
    assert set(re.findall(r"arXiv:[\d.]*\d", function.__doc__)) <= set(re.findall(r"arXiv:[\d.]*\d", text))


def test_every_setting_of_an_algorithm_is_explained_and_bounded():
    for table in TABLES.values():
        for function in table.values():
            declared = declared_settings(function)
            assert declared.keys() == settings_of(function).keys()
            assert all(setting.range and setting.help for setting in declared.values())


def test_every_option_that_chooses_among_algorithms_is_listed_with_its_default_and_help():
    names = list(OPTIONS)
    between = names[names.index("loss") : names.index("learning_rate")]
    own = {name for name in between if not name.startswith("evaluat")} | BESIDE  # those have a page of their own
    assert {(flag, what) for flag, _, what in rows(section("Settings", level=2))} == {
        (f"`{OPTIONS[name].flag}`", OPTIONS[name].help) for name in own
    }
    for flag, default, _ in rows(section("Settings", level=2)):
        assert default == shown(OPTIONS[flag.strip("`-").replace("-", "_")].default)


def shown(default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default or ("0" if default == 0 else ""))


def test_every_flag_on_the_page_exists():
    assert set(re.findall(r"`(--[a-z0-9-]+)", PAGE)) <= {option.flag for option in OPTIONS.values()}


@pytest.mark.parametrize("command", ["".join(command) for command in COMMANDS if " " in "".join(command)])
def test_what_the_page_says_to_set_is_what_the_learner_takes(command):
    config = parse_or_raise(
        LearnerConfig, shlex.split(command), program="learner", table="learner", known_tables=["learner"]
    )
    build_loss(config.loss, config.loss_setting)
    build_corrections(config.correction or None, loss=config.loss)
    build_aggregation(config.aggregation)
    build_advantages(config.advantage, config.advantage_setting)


def test_the_page_says_to_set_something():
    assert len(COMMANDS) > 8


def test_every_number_that_a_step_reports_is_explained():
    [found] = [rows(text) for text in section("What a step reports", level=2).split("\n\n") if "| name |" in text]
    assert {name.strip("`"): what.replace("\\|", "|") for name, what in found} == STEP_METRICS
