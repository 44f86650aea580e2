"""DeepSpeedNetwork: a network trained by DeepSpeed ZeRO. The one file that names deepspeed."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.lifecycle import UserError
from learner.arranging import arrange
from learner.deepspeed_config import deepspeed_config
from learner.launch import Place
from learner.networks import PolicyNetwork, load_critic, load_policy
from learner.parallelism import check_attention, check_parallelism, open_sharing
from learner.ppo_engine import PpoEngine
from learner.ranks import Alone, GlooRanks, Ranks
from learner.reference import open_reference
from learner.sharded_state import SavedState, ShardedState
from learner.tensor_parallel import TensorRanks
from learner.training import TrainSettings
from learner.zero_gradients import discard_gradient
from learner.zero_state import ZeroState

logger = logging.getLogger(__name__)

GATHERED_BYTES = 256 << 20
"""At ZeRO stage 3, of parameters that are whole on a device at once while a snapshot is copied."""


class DeepSpeedNetwork:
    """One DeepSpeed engine. Micro-batches are counted by us: `is_last` sets the accumulation boundary."""

    def __init__(self, module: nn.Module, settings: TrainSettings, tensor_ranks: TensorRanks | None = None) -> None:
        """tensor_ranks: those that have a part of each layer each."""
        import deepspeed

        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._stage = settings.zero_stage
        self._tensor_ranks = tensor_ranks
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=module, model_parameters=parameters, config=deepspeed_config(settings)
        )
        self._module = module
        parts = tensor_ranks.shards(module.named_parameters(), shapes) if tensor_ranks is not None else {}
        self._shards = {id(parameter): parts[name] for name, parameter in module.named_parameters() if name in parts}
        self._state = ZeroState(self._engine, module, stage=self._stage, shards=parts)
        if self._stage == 3 and isinstance(module, PolicyNetwork):
            # It is read outside its own forward: from here on it is gathered with the policy's.
            deepspeed.zero.register_external_parameter(module, module.model.get_output_embeddings().weight)

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
        # DeepSpeed averages over ranks with other data what is meant to be summed: the loss is divided by the count of
        # all tokens.
        self._engine.backward(loss * self._engine.dp_world_size)
        if not is_last:
            self._engine.step()  # counts the micro-batch, updates nothing

    def step(self, learning_rate: float) -> float:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._own_grad_norm() if self._stage == 0 else 0.0
        self._engine.step()
        self._state.num_steps += 1
        return norm or float(self._engine.get_global_grad_norm() or 0.0)

    def discard_gradient(self) -> None:
        discard_gradient(self._engine, stage=self._stage)

    def _own_grad_norm(self) -> float:
        """DeepSpeed does not tell the norm at stage 0."""
        gradients = [parameter.grad for parameter in self._module.parameters() if parameter.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def gathered(self, parameters: Sequence[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """See Trainable."""
        if self._stage < 3:
            yield from ((name, self._whole(parameter)) for name, parameter in parameters)
            return
        import deepspeed

        for bucket in _buckets(parameters):
            with deepspeed.zero.GatheredParameters([parameter for _, parameter in bucket]):
                yield from ((name, parameter.data) for name, parameter in bucket)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        if (shard := self._shards.get(id(parameter))) is None:
            return parameter.data
        assert self._tensor_ranks is not None
        return self._tensor_ranks.whole(parameter.data, shard)

    def copy_state(self) -> ShardedState:
        return self._state.now().copy()

    def load(self, directory: Path) -> None:
        self._state.load(SavedState(directory))


def _buckets(parameters: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, Any]]]:
    """Consecutive parameters of at most GATHERED_BYTES together; a larger one alone."""
    bucket: list[tuple[str, Any]] = []
    num_bytes = 0
    for name, parameter in parameters:
        size = parameter.ds_numel * parameter.element_size()
        if bucket and num_bytes + size > GATHERED_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append((name, parameter))
        num_bytes += size
    if bucket:
        yield bucket


def open_resumed_engine(settings: TrainSettings, checkpoint: Path | None, ranks: Ranks) -> PpoEngine:
    """At the checkpoint, if there is one; see open_deepspeed_engine()."""
    engine = open_deepspeed_engine(settings, ranks)
    if checkpoint is not None:
        engine.load(checkpoint)
        logger.info("resuming at version %d from %s", engine.version, checkpoint)
    return engine


def open_deepspeed_engine(settings: TrainSettings, ranks: Ranks | None = None) -> PpoEngine:
    """Load the policy, and the critic if there is one, onto DeepSpeed; raises UserError for a missing model.

    ranks: as open_ranks() gave them, and then all of them call this; None: the only one.
    """
    if ranks is None:
        ranks, _ = open_ranks(None, timeout_s=settings.engine.rank_timeout_s)
    check_parallelism(settings, ranks.size)
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
    critic = None
    if settings.critic_model is not None:
        critic = load_critic(settings.critic_model, dtype=settings.dtype, attention=settings.engine.attention)
    for body in [policy.model, *([critic.body] if critic is not None else [])]:
        check_attention(body, settings.engine)
        if settings.engine.activation_checkpointing:
            compute_activations_twice(body)
    sharing = open_sharing(ranks, settings.engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed's use of torch
        trained_policy = DeepSpeedNetwork(policy, settings, sharing.tensor_ranks)
        trained_critic = DeepSpeedNetwork(critic, settings, sharing.tensor_ranks) if critic is not None else None
    reference = open_reference(settings, trained_policy.device, policy)
    arrange(policy, critic, reference, settings.engine, trained_policy.device, sharing.sequence_ranks, ranks)
    return PpoEngine(settings, trained_policy, trained_critic, reference, ranks, sharing.parts)


def compute_activations_twice(body: Any) -> None:
    """In the backward pass again, layer by layer, in place of keeping them; raises UserError where a model cannot."""
    if not body.supports_gradient_checkpointing:
        raise UserError(f"activation_checkpointing: {type(body).__name__} does not support it")
    body.gradient_checkpointing_enable({"use_reentrant": False})
    for module in body.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # only then it does; of what is in it, dropout stays off


def open_ranks(place: Place | None, *, timeout_s: float) -> tuple[Ranks, Ranks]:
    """Let DeepSpeed start, with or without a launcher, and without a compiler, MPI or a fixed port.

    place: of this process among the ranks; None for the only one. Returns, when all ranks are there, two lines
    between them: one for the thread that trains, and one for the thread that writes checkpoints.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed asks for the local rank even of the only one. The rest would make ranks of processes started from here.
    os.environ.update(place.environment() if place is not None else {"LOCAL_RANK": "0"})
    import deepspeed

    # Used only for inference; it would be compiled for most of a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if place is None and not torch.distributed.is_initialized():
        # There is nobody to meet at a port, which somebody else might take between its choice and its use.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=timeout_s))
    if place is None or place.num_ranks == 1:
        return Alone(), Alone()
    return GlooRanks(timeout_s=timeout_s), GlooRanks(timeout_s=timeout_s)
