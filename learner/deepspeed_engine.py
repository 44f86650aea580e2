"""DeepSpeedNetwork: a network trained by DeepSpeed ZeRO. The one file that names deepspeed."""

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.lifecycle import UserError
from learner.networks import load_critic, load_policy
from learner.ppo_engine import PpoEngine
from learner.reference import open_reference
from learner.training import TrainSettings
from learner.zero_gradients import discard_gradient

TAG = "state"


class DeepSpeedNetwork:
    """One DeepSpeed engine. Micro-batches are counted by us: `is_last` sets the accumulation boundary."""

    def __init__(self, module: nn.Module, settings: TrainSettings) -> None:
        import deepspeed

        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._stage = settings.zero_stage
        self._trains_part = len(parameters) < len(list(module.parameters()))  # what is frozen is not checkpointed
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=_config(settings))
        self._module = module

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = self._engine(*(tensor.to(self._engine.device) for tensor in inputs))
        return output if isinstance(output, tuple) else (output,)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        # DeepSpeed averages over ranks what is meant to be summed: the loss is divided by the global token count.
        self._engine.backward(loss * self._engine.world_size)
        if not is_last:
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._own_grad_norm() if self._stage == 0 else 0.0
        self._engine.step()
        return norm or float(self._engine.get_global_grad_norm() or 0.0)

    def discard_gradient(self) -> None:
        discard_gradient(self._engine, stage=self._stage)

    def _own_grad_norm(self) -> float:
        """DeepSpeed does not tell the norm at stage 0."""
        gradients = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def save(self, directory: Path) -> None:
        # DeepSpeed's own `latest` file can name a checkpoint that is not whole; ours is named by CheckpointStore.
        self._engine.save_checkpoint(
            str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=self._trains_part
        )

    def load(self, directory: Path) -> None:
        """Raises UserError when there is no such checkpoint, or it was written with other settings."""
        if not (directory / TAG).is_dir():
            raise UserError(f"{directory} holds no checkpoint; was the run begun with another advantage?")
        is_partitioned = any((directory / TAG).glob("*zero_pp_rank_*"))
        if is_partitioned != (self._stage > 0):
            began = "1 or 2" if is_partitioned else "0"
            raise UserError(f"{directory} was written at zero_stage {began} and cannot be read at {self._stage}")
        self._engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=not self._trains_part)


def open_deepspeed_engine(settings: TrainSettings) -> PpoEngine:
    """Load the policy, and the critic if there is one, onto DeepSpeed; raises UserError for a missing model."""
    prepare_process()
    torch.manual_seed(settings.seed)
    policy = load_policy(
        settings.model,
        dtype=settings.dtype,
        temperature=settings.temperature,
        trains_entropy=settings.entropy_coefficient > 0,
        lora=settings.lora,
    )
    critic = load_critic(settings.critic_model, dtype=settings.dtype) if settings.critic_model is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's use of torch
        trained_policy = DeepSpeedNetwork(policy, settings)
        return PpoEngine(
            settings,
            trained_policy,
            DeepSpeedNetwork(critic, settings) if critic is not None else None,
            open_reference(settings, trained_policy.device, policy),
        )


def prepare_process() -> None:
    """Let DeepSpeed start without a launcher, a compiler, MPI or a fixed port."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    import deepspeed

    # Used only for inference; it would be compiled for most of a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.distributed.is_initialized():
        # There is nobody to meet at a port, which somebody else might take between its choice and its use.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False)


def _config(settings: TrainSettings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # both unused: batches are cut by tokens, boundaries set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {"stage": settings.zero_stage},
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": list(settings.adam_betas),
                "weight_decay": settings.weight_decay,
                "torch_adam": True,  # DeepSpeed's own would have to be compiled first
            },
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }
