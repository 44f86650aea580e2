"""VllmAdapters: versions of an adapter in a running AsyncLLM: loaded beside each other, each until its requests end."""

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from common.lifecycle import DedicatedThread
from common.snapshot import SnapshotError
from rollout_server.adapter_files import write_adapter_directory
from rollout_server.adapter_versions import AdapterVersions, HeldAdapter
from rollout_server.inference import EngineError, LocalSnapshot
from rollout_server.model_tensors import check_adapter
from rollout_server.vllm_start import AdapterSlots

logger = logging.getLogger(__name__)


class VllmAdapters:
    """Which adapter samples what. `seats`: as many requests as vLLM works on at once hold one each.

    In vLLM's own queue a request would keep the version that it was put there with, however old that gets.
    """

    def __init__(self, llm: Any, slots: AdapterSlots, *, max_num_seqs: int) -> None:
        self._llm = llm
        self._slots = slots
        self._versions = AdapterVersions(slots.versions)
        self._request_ended = asyncio.Condition()
        self.seats = asyncio.Semaphore(max_num_seqs)
        self.base_model = b""  # content digest of what they are added to; empty while that is not known

    def __repr__(self) -> str:
        return f"<VllmAdapters of rank {self._slots.rank}, {self._versions!r}>"

    def check(self, snapshot: LocalSnapshot, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
        """Raises SnapshotError for an adapter that cannot be added to what the engine holds."""
        spec, where = snapshot.manifest.adapter, f"snapshot {snapshot.manifest.version}"
        assert spec is not None
        if spec.rank > self._slots.rank or not {*spec.target_modules} <= {*self._slots.target_modules}:
            raise SnapshotError(
                f"{where} is an adapter of rank {spec.rank} in {', '.join(spec.target_modules)}; this engine was "
                f"started for rank {self._slots.rank} in {', '.join(self._slots.target_modules)}"
            )
        if spec.base_model != self.base_model:
            held = self.base_model.hex() or "none"
            raise SnapshotError(f"{where} is an adapter of base model {spec.base_model.hex()}, the engine holds {held}")
        check_adapter(snapshot, shapes, dtype)

    async def wait_for_room(self, version: int) -> None:
        """Where all places are taken, until a version's last request ends."""
        if not self._versions.has_room:
            logger.info(
                "version %d waits for requests of version %d to end: %d are in use, and there is room for no more",
                *(version, self._versions.oldest_in_use(), self._versions.capacity),
            )
        async with self._request_ended:
            await self._request_ended.wait_for(lambda: self._versions.has_room)

    async def load(self, snapshot: LocalSnapshot, preparing: DedicatedThread) -> float:
        """From now on new requests are sampled by it; returns the seconds in which no token was.

        Versions that no request needs any more are removed in the same pause. A failure leaves all as it was.
        """
        with tempfile.TemporaryDirectory(prefix="countercurrent-adapter-") as directory:
            await preparing.run(write_adapter_directory, snapshot, Path(directory))
            unneeded = self._versions.unneeded()
            self._versions.removed(unneeded)
            new = self._versions.begin_load(snapshot.manifest.version, directory)
            numbers = [each.number for each in unneeded]
            # vLLM would read the directory again only for an adapter that it forgot, and there is a place for each.
            took_s = await self._llm.collective_rpc("load_adapter", args=(new.name, new.number, directory, numbers))
        self._versions.loaded(new)
        return float(max(took_s))

    async def retire(self) -> None:
        """What they are added to is about to change: returns when their last request has ended."""
        self._versions.retire()
        self.base_model = b""
        async with self._request_ended:
            await self._request_ended.wait_for(lambda: self._versions.num_requests == 0)

    @asynccontextmanager
    async def newest(self) -> AsyncIterator[HeldAdapter | None]:
        """What samples a request that begins now, held until that ends; None where the whole policy was loaded."""
        adapter = self._versions.newest
        if adapter is None:
            yield None
            return
        adapter.num_requests += 1
        try:
            yield adapter
        finally:
            adapter.num_requests -= 1
            async with self._request_ended:
                self._request_ended.notify_all()


def request_of(adapter: HeldAdapter | None) -> Any:
    """vLLM's word for it."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(adapter.name, adapter.number, adapter.path) if adapter is not None else None


def adapter_token_versions(base_models: np.ndarray, version: int) -> np.ndarray:
    """`version` for every token [num_tokens] int32: one adapter samples a request from its beginning to its end.

    base_models: which of the base models that were loaded one after the other sampled each, as vLLM says.
    Raises EngineError if that is not one.
    """
    if np.unique(base_models).size > 1:
        raise EngineError(f"tokens of version {version} were sampled with more than one base model")
    return np.full_like(base_models, version)
