"""Reference: the frozen policy that the trained one is held near."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from torch.func import functional_call
from transformers import AutoTokenizer

from common.lifecycle import UserError
from learner.networks import PolicyNetwork, load_policy
from learner.training import MicroBatch, TrainSettings


class Reference(Protocol):
    """Whoever says what the frozen policy would have said."""

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """logprobs_BT of each micro-batch, float32 in host memory; 0 outside its loss mask."""
        ...


class ReferencePolicy:
    """A model of its own; between its passes an offloaded one takes no memory of the device."""

    def __init__(self, network: PolicyNetwork, *, device: torch.device, offload: bool) -> None:
        self.network = network.requires_grad_(False)
        self._device = device
        self._offload = offload
        if not offload:
            self.network.to(device)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """For what is asked of the network itself."""
        resting = next(self.network.parameters()).device
        self.network.to(self._device)
        try:
            yield
        finally:
            self.network.to(resting)

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See Reference."""
        tensors = self._copy_to_device() if self._offload else {}
        return [self._ask(micro, tensors).cpu() for micro in micro_batches]

    def _copy_to_device(self) -> dict[str, Tensor]:
        """What the network is made of, for as long as the caller holds it; what rests in host memory stays there."""
        tensors = [*self.network.named_parameters(), *self.network.named_buffers()]
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in tensors}

    def _ask(self, micro: MicroBatch, tensors: dict[str, Tensor]) -> Tensor:
        """With `tensors` in place of the network's own."""
        inputs = (micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
        logprobs_BT: Tensor
        logprobs_BT, _ = functional_call(self.network, tensors, tuple(each.to(self._device) for each in inputs))
        return logprobs_BT


class BaseReference:
    """The policy without its adapters: the model that it began as takes no memory of its own."""

    def __init__(self, policy: PolicyNetwork, *, device: torch.device) -> None:
        assert policy.adapters is not None
        self._policy = policy
        self._adapters = policy.adapters
        self._device = device

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """See Reference."""
        with torch.no_grad(), self._adapters.off():
            return [self._ask(micro).cpu() for micro in micro_batches]

    def _ask(self, micro: MicroBatch) -> Tensor:
        inputs = (micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
        logprobs_BT: Tensor
        logprobs_BT, *_ = self._policy(*(each.to(self._device) for each in inputs))
        return logprobs_BT


def open_reference(settings: TrainSettings, device: torch.device, policy: PolicyNetwork) -> Reference | None:
    """The reference of the settings, if there is one; raises UserError when it cannot be loaded or compared with."""
    name = settings.kl.reference_model
    if name is None:
        return None
    if name == settings.model and policy.adapters is not None:
        return BaseReference(policy, device=device)
    network = load_policy(
        name, dtype=settings.dtype, temperature=settings.temperature, attention=settings.engine.attention
    )
    kinds = network.model.config.model_type, policy.model.config.model_type
    if settings.engine.sequence_parallel > 1 and kinds[0] != kinds[1]:
        raise UserError(f"--sequence-parallel: the reference model {name} is a {kinds[0]}, the policy a {kinds[1]}")
    if name != settings.model and _token_ids(name) != _token_ids(settings.model):
        raise UserError(
            f"the reference model {name} has another tokenizer than {settings.model}: its token ids mean other words"
        )
    return ReferencePolicy(network, device=device, offload=settings.kl.reference_offload)


def _token_ids(model: str) -> dict[str, int]:
    vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(model).get_vocab()
    return vocabulary
