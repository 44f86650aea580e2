import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

os.environ.setdefault("OMP_NUM_THREADS", "1")

from learner.demo.model import build_demo_model
from tests.system.processes import Stage, a_stage


@pytest_asyncio.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with a_stage(tmp_path) as stage:
        yield stage


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made once: the learner would make one in each run directory."""
    directory = tmp_path_factory.mktemp("model") / "demo-model"
    build_demo_model(directory)
    return str(directory)
