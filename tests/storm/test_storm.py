"""One storm of `make storm`, small enough for every day."""

import random

import pytest

from tests.storm.__main__ import storm
from tests.storm.resume import run_once


@pytest.mark.timeout(400)
async def test_a_storm_of_kills_loses_nothing_trains_nothing_twice_and_nothing_too_old(tmp_path):
    verdict, faults = await storm(tmp_path, seed=1, steps=300, kills=12, servers=2)
    assert verdict.complaints == []
    assert faults.hits.total() >= 6
    assert verdict.num_evaluations >= 10  # every 20 of 300 versions; some are due while the learner is away
    assert verdict.num_acknowledged > 1000  # of 1200; a server that was killed may not have noted its last ones
    assert verdict.num_filtered > 100


@pytest.mark.timeout(400)
async def test_the_weights_of_a_run_that_was_killed_are_those_of_one_that_was_not(tmp_path):
    undisturbed = await run_once(tmp_path / "undisturbed", rng=random.Random(0), kills=0)
    killed = await run_once(tmp_path / "killed", rng=random.Random(0), kills=6)
    assert len(killed.points) == 6
    assert killed.tasks == undisturbed.tasks
    assert killed.weights == undisturbed.weights
