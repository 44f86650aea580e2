"""What runs inside vLLM's worker processes: reading a snapshot from a file into the model, in place.

vLLM imports this module in every worker before it builds the model, because `worker_extension_cls` names it.
"""

import mmap
import os
import select
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import utils as layer_utils
from vllm.platforms import current_platform


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


_end_with(int(os.environ["ROLLOUT_SERVER_PID"]))  # set by vllm_start.py; not always the parent
# Ctrl-C reaches all processes of a terminal; the server alone decides how its engine ends.
signal.signal(signal.SIGINT, signal.SIG_IGN)
if current_platform.is_cpu():
    layer_utils.dispatch_cpu_unquantized_gemm = _use_plain_gemm


class SnapshotLoader:
    """Methods that vLLM adds to its Worker class; the names must not be taken there. Called through collective_rpc."""

    def load_snapshot(self, path: str, tensors: Sequence[tuple[str, Sequence[int], str, int]]) -> None:
        """Copy tensors, each (Hugging Face name, shape, dtype, offset in the file), into the model's parameters.

        Raises ValueError when a tensor does not lie wholly within the file, or a parameter keeps its old value.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        with set_current_vllm_config(self.vllm_config), torch.no_grad():  # type: ignore[attr-defined]
            replaced = model.load_weights(_read_tensors(Path(path), tensors))
        if kept := sorted({name for name, _ in model.named_parameters()} - replaced):
            raise ValueError(f"{len(kept)} parameters were not replaced, among them {kept[0]}")
        if not current_platform.is_cpu():
            torch.accelerator.synchronize()


def _read_tensors(
    path: Path, tensors: Sequence[tuple[str, Sequence[int], str, int]]
) -> Iterator[tuple[str, torch.Tensor]]:
    with path.open("rb") as file:
        # Copy-on-write, because torch wants a writable buffer; nothing is ever written, so nothing is copied.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for name, shape, dtype, offset in tensors:
        size = torch.Size(shape)
        yield name, torch.frombuffer(data, dtype=getattr(torch, dtype), count=size.numel(), offset=offset).view(size)
