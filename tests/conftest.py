"""One thread for all of torch's arithmetic: with more, sums are taken in another order and comparisons to the last
digits depend on the load of the machine."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

SHARED = {"live": "vllm", "faulty": "vllm", "pair": "ranks"}
"""Fixtures of the session that take long to start: of each kind one process makes them, and runs what wants them."""

WITH_PROCESSES = tuple(Path(__file__).parent / name for name in ("storm", "system"))
"""Whose tests start several processes each: one after the other, beside those that need no more than their own."""


LONGEST = {"processes": 0, "ranks": 1, "vllm": 2}


def _group_of(item: pytest.Item) -> str:
    fixtures = getattr(item, "fixturenames", ())
    if any(item.path.is_relative_to(directory) for directory in WITH_PROCESSES):
        return "processes"
    return next((kind for name, kind in SHARED.items() if name in fixtures), item.path.as_posix())


@pytest.hookimpl(tryfirst=True)  # xdist looks at the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup a process takes one group after the other: mostly a file. The longest ones come first."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group(_group_of(item)))
    items.sort(key=lambda item: LONGEST.get(_group_of(item), len(LONGEST)))
