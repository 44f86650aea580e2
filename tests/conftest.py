"""One thread for all of torch's arithmetic: with more, sums are taken in another order and comparisons to the last
digits depend on the load of the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

SHARED = {"live": "vllm", "faulty": "vllm", "adapted": "vllm", "pair": "ranks"}
"""Fixtures of the session that take long to start: of each kind one process makes them, and runs what wants them."""


@pytest.hookimpl(tryfirst=True)  # xdist looks at the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With --dist loadgroup a process takes whole files, but for tests that want something SHARED."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        shared = next((kind for name, kind in SHARED.items() if name in fixtures), None)
        item.add_marker(pytest.mark.xdist_group(shared or item.path.as_posix()))
