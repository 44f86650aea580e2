"""Real vLLM engines, started once per session, for tests of what sits on an engine."""

import itertools
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from transformers import Qwen2ForCausalLM

from rollout_server.inference import LocalSnapshot, WeightUpdate
from rollout_server.vllm_engine import VllmEngine, open_vllm_engine
from rollout_server.vllm_start import VllmSettings
from tests.models import a_model, save_model, write_snapshot

MAX_MODEL_LEN = 512


def tiny_settings(model: Path) -> VllmSettings:
    return VllmSettings(
        model=str(model), dtype="float32", max_model_len=MAX_MODEL_LEN, max_num_seqs=64, kv_cache_bytes=64 << 20
    )


@dataclass(kw_only=True)
class LiveEngine:
    """An engine together with the models whose weights it was given, by version."""

    engine: VllmEngine
    directory: Path
    tied: bool
    shape: dict[str, int] = field(default_factory=dict)  # where it is not the tiny model's
    models: dict[int, Qwen2ForCausalLM] = field(default_factory=dict)
    _versions: Iterator[int] = field(default_factory=itertools.count)

    def next_snapshot(self) -> LocalSnapshot:
        """A snapshot of the next version, with weights unlike any before."""
        version = next(self._versions)
        self.models[version] = a_model(1000 + version, tied=self.tied, **self.shape)
        path = self.directory / f"snapshot-{version}"
        return LocalSnapshot(manifest=write_snapshot(path, self.models[version], version=version), path=path)

    async def load_next(self) -> WeightUpdate:
        return await self.engine.load_weights(self.next_snapshot())


async def live_engine(
    directory: Path, *, tied: bool, tensor_parallel_size: int = 1, **shape: int
) -> AsyncIterator[LiveEngine]:
    model = save_model(directory / "model", a_model(0, tied=tied, **shape))
    settings = replace(tiny_settings(model), tensor_parallel_size=tensor_parallel_size)
    async with open_vllm_engine(settings) as engine:
        yield LiveEngine(engine=engine, directory=directory, tied=tied, shape=shape)


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=["tied", "untied"])
async def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveEngine]:
    """One engine per kind of embedding for the whole session; every test loads the weights that it wants."""
    async for engine in live_engine(tmp_path_factory.mktemp(request.param), tied=request.param == "tied"):
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def faulty(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LiveEngine]:
    """An engine whose worker goes wrong when it is told to; whoever tells it tells it to stop."""
    from vllm.engine import arg_utils

    class FaultyArgs(arg_utils.AsyncEngineArgs):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings | {"worker_extension_cls": "tests.rollout_server.faulty_worker.FaultyLoader"})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arg_utils, "AsyncEngineArgs", FaultyArgs)
        async for engine in live_engine(tmp_path_factory.mktemp("faulty"), tied=True):
            yield engine


async def set_fault(engine: VllmEngine, fault: str) -> None:
    """One of faulty_worker's, or "none"."""
    await engine._llm.collective_rpc("set_fault", args=(fault,))


@pytest_asyncio.fixture(loop_scope="session")
async def disposable(tmp_path: Path) -> AsyncIterator[LiveEngine]:
    """An engine for one test, which may break it."""
    async for engine in live_engine(tmp_path, tied=True):
        yield engine


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=[1, 2])
async def sharded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LiveEngine]:
    """An engine of two ranks. A single head of keys and values is on both; of two heads each rank has one."""
    directory = tmp_path_factory.mktemp("sharded")
    heads = request.param
    async for engine in live_engine(directory, tied=heads == 1, tensor_parallel_size=2, num_key_value_heads=heads):
        yield engine
