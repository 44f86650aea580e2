"""One storm of `make storm`, small enough for every day."""

import pytest

from tests.storm.__main__ import storm


@pytest.mark.timeout(400)
async def test_a_storm_of_kills_loses_nothing_trains_nothing_twice_and_nothing_too_old(tmp_path):
    verdict, faults = await storm(tmp_path, seed=1, steps=300, kills=12, servers=2)
    assert verdict.complaints == []
    assert faults.hits.total() >= 6
    assert verdict.num_acknowledged >= 1200
