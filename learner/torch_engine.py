"""TorchNetwork: a network trained by plain torch: the twin of the DeepSpeed one, and its oracle."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from learner.networks import load_critic, load_policy
from learner.ppo_engine import PpoEngine
from learner.reference import open_reference
from learner.sharded_state import SavedState, ShardedState
from learner.training import TrainSettings
from learner.zero_state import ZeroState


class TorchNetwork:
    """AdamW on one process, float32. What it keeps it writes as ZeRO's stage 0 does."""

    global_rank = 0
    world_size = 1

    def __init__(self, module: nn.Module, settings: TrainSettings) -> None:
        self._module = module
        self._max_grad_norm = settings.max_grad_norm
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self._trained.values(),
            lr=0.0,
            betas=settings.adam_betas,
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
        )
        self._state = ZeroState(self, module, stage=0)

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
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._state.num_steps += 1
        return float(norm)

    def discard_gradient(self) -> None:
        self.optimizer.zero_grad()

    def gathered(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, parameter.data) for name, parameter in parameters)

    def copy_state(self) -> ShardedState:
        return self._state.now().copy()

    def load(self, directory: Path) -> None:
        self._state.load(SavedState(directory))


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
        attention=settings.engine.attention,
        has_value_head=settings.value_head,
    )
    critic = load_critic(settings.critic_model, dtype=settings.dtype) if settings.critic_model is not None else None
    return PpoEngine(
        settings,
        TorchNetwork(policy, settings),
        TorchNetwork(critic, settings) if critic is not None else None,
        open_reference(settings, torch.device("cpu"), policy),
    )
