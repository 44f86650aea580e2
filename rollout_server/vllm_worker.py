"""What runs inside vLLM's worker processes: bringing a snapshot, or what changed in it, into the model, in place.

vLLM imports this module in every worker before it builds the model, because `worker_extension_cls` names it.
"""

import mmap
import os
import select
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers import utils as layer_utils
from vllm.platforms import current_platform

from rollout_server.copy_recorder import CopyRecorder


def _use_plain_gemm(layer: torch.nn.Module, remove_weight: bool) -> None:
    """Stands in for vLLM's packing of weights into oneDNN handles: multiplies by the parameter itself.

    A packed handle is a copy. A weight update reaches the parameter but not the copy, so that a linear layer cannot
    be updated at all, and an output layer tied to the embedding silently keeps its old weights.
    """
    layer.cpu_linear = torch.nn.functional.linear


def _end_with(pid: int) -> None:
    """End this process as soon as process `pid` ends: vLLM's processes would outlive a killed rollout server."""
    pidfd = os.pidfd_open(pid)

    def wait() -> None:
        select.select([pidfd], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, name="end with rollout server", daemon=True).start()


Part = tuple[str, int, int]

_end_with(int(os.environ["ROLLOUT_SERVER_PID"]))  # set by vllm_start.py; not always the parent
# Ctrl-C reaches all processes of a terminal; the server alone decides how its engine ends.
signal.signal(signal.SIGINT, signal.SIG_IGN)
if current_platform.is_cpu():
    layer_utils.dispatch_cpu_unquantized_gemm = _use_plain_gemm


class SnapshotLoader:
    """Methods that vLLM adds to its Worker class; the names must not be taken there. Called through collective_rpc."""

    def load_snapshot(self, path: str, tensors: Sequence[tuple[str, Sequence[int], str, int]]) -> list[Any]:
        """Copy tensors, each (Hugging Face name, shape, dtype, offset in the file), into the model's parameters.

        Returns this worker's rank, where the tensors went (the fields of Placements), and why that is not known,
        if it is not.
        Raises ValueError when a tensor does not lie wholly within the file, or a parameter keeps its old value.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        with _without_adapters(model):
            parameters = dict(model.named_parameters())
            recorder = CopyRecorder(parameters)
            with set_current_vllm_config(self.vllm_config), torch.no_grad(), recorder:  # type: ignore[attr-defined]
                replaced = model.load_weights(recorder.watch(_read_tensors(Path(path), tensors)))
        if kept := sorted(parameters.keys() - replaced):
            raise ValueError(f"{len(kept)} parameters were not replaced, among them {kept[0]}")
        _wait_for_device()
        rank: int = self.rank  # type: ignore[attr-defined]
        try:
            return [rank, [astuple(placement) for placement in recorder.placements()], ""]
        except ValueError as error:
            return [rank, [], str(error)]

    def write_changes(self, patches: Sequence[tuple[int, str, int, Sequence[Part]]]) -> None:
        """Write single elements into the model's parameters.

        patches: for each rank (rank, path, M, parts); the file holds M int64 indices, then M values. Each part
        (parameter, start, count) says that items [start, start + count) of both belong to this parameter.
        """
        own_rank: int = self.rank  # type: ignore[attr-defined]
        [(_, path, num_items, parts)] = [patch for patch in patches if patch[0] == own_rank]
        if not num_items:
            return
        with _without_adapters(model := self.get_model()):  # type: ignore[attr-defined]
            parameters = dict(model.named_parameters())
        data = _map(Path(path))
        with torch.no_grad():
            for name, start, count in parts:
                flat = parameters[name].data.view(-1)
                indices = torch.frombuffer(data, dtype=torch.int64, count=count, offset=start * 8)
                offset = num_items * 8 + start * flat.itemsize
                values = torch.frombuffer(data, dtype=flat.dtype, count=count, offset=offset)
                # Takes 0.6 of the time of an assignment to flat[indices].
                flat.index_copy_(
                    0, indices.to(flat.device, non_blocking=True), values.to(flat.device, non_blocking=True)
                )
        _wait_for_device()

    def load_adapter(self, name: str, number: int, path: str, unneeded: Sequence[int]) -> float:
        """Load the PEFT directory `path` beside the model, and remove what is not needed, by number, before.

        Returns seconds, in which no token was sampled. Raises ValueError for an adapter that does not fit.
        """
        start_s = time.perf_counter()
        for each in unneeded:
            self.remove_lora(each)  # type: ignore[attr-defined]
        self.add_lora(LoRARequest(name, number, path))  # type: ignore[attr-defined]
        _wait_for_device()
        return time.perf_counter() - start_s


@contextmanager
def _without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """The layers that vLLM wrapped to add adapters stand at their own places again, under their own names."""
    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseLayerWithLoRA)]
    places = [
        (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], module) for name, module in wrapped
    ]
    for parent, name, module in places:
        setattr(parent, name, module.base_layer)
    try:
        yield
    finally:
        for parent, name, module in places:
            setattr(parent, name, module)


def _wait_for_device() -> None:
    if not current_platform.is_cpu():
        torch.accelerator.synchronize()


def _map(path: Path) -> mmap.mmap:
    """Copy-on-write, because torch wants a writable buffer; nothing is ever written, so nothing is copied."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_tensors(
    path: Path, tensors: Sequence[tuple[str, Sequence[int], str, int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    data = _map(path)
    for name, shape, dtype, offset in tensors:
        size = torch.Size(shape)
        yield name, torch.frombuffer(data, dtype=getattr(torch, dtype), count=size.numel(), offset=offset).view(size)
