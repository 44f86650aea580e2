"""Adapters: low-rank adapters in a causal language model, which alone are trained. The one file that names peft."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import Linear, LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from common.lifecycle import UserError
from learner.lora_settings import ALL_LINEAR, LoraSettings
from learner.networks import Gather

_NAME = "default"
_PREFIX = "base_model.model."  # of every name in a PEFT directory


class Adapters:
    """Puts adapters into `model`, in place: it answers as before, because B begins as zeros.

    Raises UserError when no layer of the model has a name that the settings want.
    """

    def __init__(self, model: nn.Module, settings: LoraSettings) -> None:
        self._model: Any = model
        self._settings = settings
        self._config = LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=self._model.config._name_or_path,
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(settings.target_modules) or ALL_LINEAR,
            lora_dropout=settings.dropout,
        )
        try:
            inject_adapter_in_model(self._config, model, _NAME)
        except ValueError as error:
            raise UserError(f"lora_target_modules {', '.join(settings.target_modules)}: {error}") from error
        for name, layer in self._layers().items():
            if not isinstance(layer, Linear):
                raise UserError(
                    f"lora_target_modules {', '.join(settings.target_modules)}: {name} is not a linear layer, and "
                    "adapters go into these alone"
                )
        dtype = next(model.parameters()).dtype
        for parameter in self._parameters().values():
            parameter.data = parameter.data.to(dtype)  # of the model they stand in
        for layer in self._layers().values():
            for name, dropout in layer.lora_dropout.items():
                if isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = GradientDropout(dropout.p)

    def __repr__(self) -> str:
        return f"<Adapters in {len(self._layers())} layers, {self._settings}>"

    @property
    def settings(self) -> LoraSettings:
        return self._settings

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """A [rank, inputs] and B [outputs, rank] of each layer, by their names in a PEFT directory."""
        return [(_peft_name(name), each) for name, each in self._parameters().items()]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model is, meanwhile, exactly the one that the adapters were put into."""
        with rescale_adapter_scale(self._model, 0.0):
            yield

    def save(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        """Write a PEFT directory: what PeftModel.from_pretrained and vLLM load beside the base model.

        tensors: those of parameters(), whole, in host memory.
        """
        self._config.save_pretrained(str(directory))
        own = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(own, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    def base_model(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by Hugging Face name as they were before adapters, one after the other."""
        own = self._parameters()
        base = [(name, each) for name, each in self._model.named_parameters() if name not in own]
        for name, tensor in gather(base):
            yield name.replace(".base_layer.", "."), tensor

    def merged(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters by Hugging Face name, each with its adapter added, one after the other."""
        adapters = {name: tensor.clone() for name, tensor in gather(list(self._parameters().items()))}
        layers = self._layers()
        base = [(name, each) for name, each in self._model.named_parameters() if name not in adapters]
        for name, tensor in gather(base):
            layer_name, is_base, rest = name.partition(".base_layer.")
            value = tensor
            if is_base and rest == "weight":
                up, down = (adapters[f"{layer_name}.lora_{part}.{_NAME}.weight"].float() for part in "BA")
                change = layers[layer_name].scaling[_NAME] * (up @ down)
                value = tensor + (change.T if layers[layer_name].fan_in_fan_out else change).to(tensor.dtype)
            yield f"{layer_name}.{rest}" if is_base else name, value.contiguous()

    def _layers(self) -> dict[str, Any]:
        return {name: module for name, module in self._model.named_modules() if isinstance(module, LoraLayer)}

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: each for name, each in self._model.named_parameters() if each.requires_grad}


def _peft_name(name: str) -> str:
    return _PREFIX + name.replace(f".{_NAME}.", ".")


class GradientDropout(nn.Module):
    """Dropout where a gradient is computed, and nowhere else.

    What the policy says of a batch before the step, and what servers sample with, is of the whole adapter.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.dropout(inputs, self.share, training=torch.is_grad_enabled())
