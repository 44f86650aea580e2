import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.algorithms.moments import Moments

numbers = st.lists(st.floats(-1e6, 1e6, width=32), max_size=20)


@given(numbers, numbers)
def test_parts_that_are_merged_are_as_one_whole(one, other):
    merged = Moments.of(torch.tensor(one)).merged(Moments.of(torch.tensor(other)))
    whole = Moments.of(torch.tensor(one + other))
    assert merged.count == whole.count == len(one) + len(other)
    assert merged.mean == pytest.approx(whole.mean, rel=1e-9, abs=1e-6)
    assert merged.std == pytest.approx(whole.std, rel=1e-6, abs=1e-3)


@given(numbers.filter(bool))
def test_mean_and_deviation_are_those_of_the_definition(values):
    moments = Moments.of(torch.tensor(values))
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / len(values)
    assert moments.mean == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert moments.std == pytest.approx(math.sqrt(variance), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("value", [0.1, -1 / 3, 1e8 / 3])
def test_numbers_that_are_all_the_same_do_not_deviate_however_they_are_cut(value):
    moments = Moments()
    for size in (1, 7, 0, 1000):
        moments = moments.merged(Moments.of(torch.full((size,), value)))
    assert moments.squares == 0.0
    assert not moments.normalize(torch.full((3,), value)).any()


def test_of_nothing_nothing_is_known_and_normalizing_by_it_only_centers_on_zero():
    assert Moments.of(torch.tensor([])) == Moments() == Moments().merged(Moments())
    assert Moments().std == 0.0


def test_normalized_numbers_keep_their_dtype():
    values = torch.tensor([1.0, 2.0, 3.0])
    normalized = Moments.of(values).normalize(values)
    assert normalized.dtype == torch.float32
    assert normalized.tolist() == pytest.approx([-1.2247, 0.0, 1.2247], abs=1e-4)
