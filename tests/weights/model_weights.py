"""The parameters of a real model, as a fleet's weights."""

import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from common.canary import TOLERANCES, Canary, make_canary
from tests.models import forward_logprobs
from tests.weights.fleet import Weights


class ModelWeights(Weights):
    """A model that changes a little, as training would have it, or everywhere; its canary is transformers' own."""

    def __init__(self, model: Qwen2ForCausalLM, canary_prompt: np.ndarray) -> None:
        super().__init__()
        self.model = model
        self.tensors = [(name, parameter.data) for name, parameter in model.named_parameters()]
        self._prompt = canary_prompt
        self._generator = torch.Generator().manual_seed(0)

    def change(self, share: float) -> None:
        for _, tensor in self.tensors:
            is_changed = torch.rand(tensor.shape, generator=self._generator) < share
            tensor += is_changed * 0.02 * torch.randn(tensor.shape, generator=self._generator)

    def replace(self) -> None:
        self.change(1.0)

    def remember(self, version: int) -> None: ...

    def canary(self) -> Canary | None:
        logprobs = forward_logprobs(self.model, self._prompt)
        return make_canary(self._prompt.tolist(), logprobs, TOLERANCES["float32"])
