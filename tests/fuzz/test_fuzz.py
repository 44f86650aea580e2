"""A campaign in every test run; `make fuzz` for more."""

import os
from collections import Counter

import pytest

from tests.fuzz.campaign import campaign

FRAMES = 1_000_000


@pytest.mark.timeout(400)
def test_a_million_damaged_frames_are_refused_with_the_declared_error_or_keep_every_promise():
    frames: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    for chunk in campaign(FRAMES, workers=os.cpu_count() or 1):
        assert not chunk.failure, f"{chunk.target}, seed {chunk.seed}: {chunk.failure}"
        frames[chunk.target] += chunk.frames
        refused[chunk.target] += chunk.refused
    assert frames.total() >= FRAMES
    for target, count in frames.items():
        assert count / 3 < refused[target] < count, f"{target}: the damage is too little or too much to test anything"
