"""BaseModel: what adapters stand beside, in memory of its own that servers load from before their first adapter."""

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from common.snapshot import TensorSpec
from learner.lora_settings import AdapterDescription, LoraSettings
from learner.slots import Slots, lay_out


class BaseModel:
    """Written once: adapters are trained and it is not. Memory: the bytes of the model."""

    def __init__(self, tensors: Callable[[], Iterable[tuple[str, Tensor]]], adapter: AdapterDescription) -> None:
        """tensors: gives all of them, one after the other, each time that it is called."""
        self.layout = lay_out(tensors())
        self.slots = Slots(sum(spec.num_bytes for spec in self.layout), num_slots=1)
        self.slots.write(0, self.layout, tensors())
        self.adapter = adapter

    def __repr__(self) -> str:
        return f"<BaseModel of {self.slots.slot_bytes} bytes, {self.adapter}>"


def describe_adapter(lora: LoraSettings, layout: Sequence[TensorSpec]) -> AdapterDescription:
    """layout: of the adapter's tensors, such as base_model.model.layers.0.q_proj.lora_A.weight."""
    names = {spec.name.split(".")[-3] for spec in layout}
    return AdapterDescription(rank=lora.rank, alpha=lora.alpha, target_modules=tuple(sorted(names)))
