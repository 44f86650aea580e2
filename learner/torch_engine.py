"""TorchNetwork: a network trained by plain torch: the twin of the DeepSpeed one, and its oracle."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learner.networks import load_critic, load_policy
from learner.ppo_engine import PpoEngine
from learner.reference import open_reference
from learner.training import TrainSettings


class TorchNetwork:
    """AdamW on one process, float32."""

    def __init__(self, module: nn.Module, settings: TrainSettings) -> None:
        self._module = module
        self._max_grad_norm = settings.max_grad_norm
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=0.0, betas=settings.adam_betas, weight_decay=settings.weight_decay
        )

    @property
    def module(self) -> nn.Module:
        return self._module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self._module(*inputs)
        return output if isinstance(output, tuple) else (output,)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        del is_last
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = nn.utils.clip_grad_norm_(self._trained.values(), self._max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        save_file({name: each.data for name, each in self._trained.items()}, directory / "parameters.safetensors")
        torch.save(self._optimizer.state_dict(), directory / "optimizer.pt")

    def load(self, directory: Path) -> None:
        saved = load_file(directory / "parameters.safetensors")
        for name, parameter in self._trained.items():
            parameter.data.copy_(saved[name])
        self._optimizer.load_state_dict(torch.load(directory / "optimizer.pt", weights_only=True))


def open_torch_engine(settings: TrainSettings) -> PpoEngine:
    """The whole learner's maths without DeepSpeed; settings.zero_stage is ignored."""
    if settings.dtype != "float32":
        raise ValueError(f"the torch engine trains in float32, got {settings.dtype}")
    torch.manual_seed(settings.seed)
    policy = load_policy(
        settings.model,
        dtype=settings.dtype,
        temperature=settings.temperature,
        trains_entropy=settings.entropy_coefficient > 0,
        lora=settings.lora,
    )
    critic = load_critic(settings.critic_model, dtype=settings.dtype) if settings.critic_model is not None else None
    return PpoEngine(
        settings,
        TorchNetwork(policy, settings),
        TorchNetwork(critic, settings) if critic is not None else None,
        open_reference(settings, torch.device("cpu"), policy),
    )
