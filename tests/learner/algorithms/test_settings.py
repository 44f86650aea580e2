import inspect
import math
from typing import Annotated

import pytest

from learner.algorithms import (
    ADVANTAGES,
    AGGREGATIONS,
    CORRECTIONS,
    LOSSES,
    OFF_POLICY_ADVANTAGES,
    WEIGHINGS,
    WEIGHTED_LOSSES,
    WHOLE_BATCH_LOSSES,
    describe_all,
    settings_of,
)
from learner.algorithms.settings import Setting, build, describe, parse_call
from learner.loss_settings import WITH_CRITIC

TABLES = [LOSSES, CORRECTIONS, AGGREGATIONS, ADVANTAGES]


def flip(samples, *, by: Annotated[float, Setting("turns", at_least=0, at_most=2)] = 1.0, times: float = 3.0):
    """Turns everything round.

    More of it.
    """
    return samples, by, times


def test_a_function_is_built_with_what_was_chosen_and_its_defaults():
    assert build("loss", {"flip": flip}, "flip", {"by": 0.5})("samples") == ("samples", 0.5, 3.0)


@pytest.mark.parametrize("by", [-0.1, 2.1, math.nan, math.inf])
def test_a_value_out_of_bounds_is_refused(by):
    with pytest.raises(ValueError, match="by of flip must be >= 0 and <= 2, got"):
        build("loss", {"flip": flip}, "flip", {"by": by})


@pytest.mark.parametrize("by", [0.0, 2.0])
def test_bounds_count_as_within(by):
    assert build("loss", {"flip": flip}, "flip", {"by": by})("samples") == ("samples", by, 3.0)


def test_an_exclusive_bound_does_not():
    assert not Setting("", more_than=0).admits(0.0)
    assert Setting("", more_than=0).admits(1e-9)


def test_a_setting_without_a_declaration_takes_any_number():
    assert build("loss", {"flip": flip}, "flip", {"times": -9.0})("samples") == ("samples", 1.0, -9.0)


def test_a_function_is_described_by_its_first_line_and_its_settings():
    assert describe("losses", {"flip": flip}).splitlines() == [
        "losses",
        f"  {'flip':<28}  Turns everything round.",
        f"    {'by=1':<28}turns",
        "    times=3",
    ]


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("veto", ("veto", {})),
        ("icepop:low=0.5,high=2", ("icepop", {"low": 0.5, "high": 2.0})),
        ("icepop:low=1e-3", ("icepop", {"low": 1e-3})),
        ("product_mask:high=inf", ("product_mask", {"high": math.inf})),
    ],
)
def test_a_call_is_read_from_text(text, call):
    assert parse_call(text) == call


def test_everything_that_can_be_chosen_is_described_with_all_its_settings():
    text = describe_all()
    for table in TABLES:
        for name, function in table.items():
            assert f"  {name} " in text
            assert all(f"    {setting}=" in text for setting in settings_of(function))


@pytest.mark.parametrize("function", [function for table in TABLES for function in table.values()])
def test_every_description_is_one_sentence_on_one_line(function):
    first, _, rest = (inspect.getdoc(function) or "").partition("\n")
    assert first.endswith(".")
    assert rest == "" or rest.startswith("\n")


def test_what_is_said_of_names_is_said_of_names_that_exist():
    assert LOSSES.keys() > WEIGHTED_LOSSES | WHOLE_BATCH_LOSSES
    assert CORRECTIONS.keys() > WEIGHINGS
    assert OFF_POLICY_ADVANTAGES < set(WITH_CRITIC) < ADVANTAGES.keys()
