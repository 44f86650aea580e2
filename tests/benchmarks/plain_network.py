"""PlainNetwork: the step that DeepSpeed's is compared with, in as few calls of torch as it takes."""

from pathlib import Path

import torch
from torch import nn

from learner.networks import load_policy
from learner.packing import Arrangement
from learner.ppo_engine import PpoEngine
from learner.sharded_state import ShardedState
from learner.torch_engine import TorchNetwork
from learner.training import TrainSettings


class PlainNetwork(TorchNetwork):
    """AdamW on float32 masters of a bfloat16 network, on one process: what ZeRO's stage 1 does with bf16 enabled."""

    def __init__(self, module: nn.Module, settings: TrainSettings) -> None:
        super().__init__(module, settings)
        self._masters = [each.detach().float().requires_grad_() for each in self._trained.values()]
        self.optimizer = torch.optim.AdamW(
            self._masters, lr=0.0, betas=settings.adam_betas, weight_decay=settings.weight_decay
        )

    def step(self, learning_rate: float) -> float:
        for master, parameter in zip(self._masters, self._trained.values(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float()
        norm = nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self._masters, self._trained.values(), strict=True):
                parameter.copy_(master)
                parameter.grad = None
        return float(norm)

    def copy_state(self) -> ShardedState:
        raise NotImplementedError("a benchmark writes no checkpoint")

    def load(self, directory: Path) -> None:
        raise NotImplementedError("a benchmark reads no checkpoint")


def open_plain_engine(settings: TrainSettings) -> PpoEngine:
    """The same step in plain torch, in the type of the settings, packed as DeepSpeed's is."""
    torch.manual_seed(settings.seed)
    policy = load_policy(settings.model, dtype=settings.dtype, temperature=settings.temperature)
    policy.arrangement = Arrangement(packs=settings.engine.packing)
    kind = TorchNetwork if settings.dtype == "float32" else PlainNetwork
    return PpoEngine(settings, kind(policy, settings), None)
