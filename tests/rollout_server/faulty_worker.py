"""A worker of vLLM whose weight updates go wrong in the ways that really happen, when it is told to.

Named to vLLM in the place of rollout_server.vllm_worker.SnapshotLoader.
"""

from collections.abc import Sequence

import torch
from vllm.model_executor.layers import utils as layer_utils

pack_weights = layer_utils.dispatch_cpu_unquantized_gemm  # vLLM's own; importing our worker replaces it

from rollout_server.vllm_worker import SnapshotLoader  # noqa: E402

PACKED = "vLLM packs the tied output layer"
Tensors = Sequence[tuple[str, Sequence[int], str, int]]


class FaultyLoader(SnapshotLoader):
    """One fault at a time; "none" at the start."""

    fault = "none"
    is_packed = False

    def set_fault(self, fault: str) -> None:
        self.fault = fault

    def load_snapshot(self, path: str, tensors: Tensors, *others: object) -> None:
        model = self.get_model()  # type: ignore[attr-defined]
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        if self.fault == PACKED and not self.is_packed:  # the parameter moves from now on, the handle stays
            pack_weights(model.lm_head, remove_weight=False)
        self.is_packed = self.fault == PACKED
        super().load_snapshot(path, tensors, *others)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            if self.fault == "a flipped bit after the digest":
                words = parameters["model.layers.1.mlp.down_proj.weight"].view(torch.int32).view(-1)
                words[7] ^= 1 << 29
            elif self.fault == "a skipped tensor":
                parameters["model.layers.0.self_attn.o_proj.weight"].copy_(
                    before["model.layers.0.self_attn.o_proj.weight"]
                )
            elif self.fault == "a wrong base":  # every tenth element is of the version before
                for name, parameter in parameters.items():
                    parameter.view(-1)[::10] = before[name].view(-1)[::10]
        if not self.is_packed:
            model.lm_head.cpu_linear = torch.nn.functional.linear
