"""Which tensors a model consists of, and whether a snapshot brings exactly those."""

from collections.abc import Mapping, Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from common.snapshot import SnapshotError
from rollout_server.inference import LocalSnapshot

MAX_NAMES_SHOWN = 5
PEFT_PREFIX = "base_model.model."  # of every name in an adapter
_ENDINGS = (".lora_A.weight", ".lora_B.weight")


def expected_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """The parameters of a model directory or Hugging Face name, by name; tied ones once. Reads no weights."""
    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def checkpoint_dtype(model: str) -> str:
    """The type that the model's config declares for its weights, such as "bfloat16"."""
    return str(AutoConfig.from_pretrained(model).dtype or torch.float32).removeprefix("torch.")


def check_snapshot(snapshot: LocalSnapshot, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raises SnapshotError unless the snapshot holds every parameter of the model, and nothing else.

    An engine that loads tensors by name keeps old values for names that it does not get, without saying so.
    """
    manifest = snapshot.manifest
    where = f"snapshot {manifest.version}"
    names = {tensor.name for tensor in manifest.tensors}
    if missing := sorted(shapes.keys() - names):
        raise SnapshotError(f"{where} lacks {_listed(missing)}: it is of another model, or a part of this one")
    if unexpected := sorted(names - shapes.keys()):
        raise SnapshotError(f"{where} has {_listed(unexpected)}, which this model does not have")
    for tensor in manifest.tensors:
        if tensor.shape != shapes[tensor.name]:
            raise SnapshotError(
                f"{where}: {tensor.name} has shape {tensor.shape}, the model's is {shapes[tensor.name]}"
            )
        if tensor.dtype != dtype:
            raise SnapshotError(
                f"{where}: {tensor.name} is {tensor.dtype}, the engine runs in {dtype}; they must be the same"
            )
    if (num_bytes := snapshot.path.stat().st_size) != manifest.num_bytes:
        raise SnapshotError(f"{where} has {manifest.num_bytes} bytes, {snapshot.path} has {num_bytes}; pull it again")


def check_adapter(snapshot: LocalSnapshot, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """Raises SnapshotError unless the snapshot is A and B of linear layers that the model has, of the rank it says.

    shapes: of the model without adapters.
    """
    manifest, spec = snapshot.manifest, snapshot.manifest.adapter
    where = f"snapshot {manifest.version}"
    assert spec is not None
    found = {tensor.name: tensor for tensor in manifest.tensors}
    expected: dict[str, tuple[int, ...]] = {}
    for name in sorted({name.removesuffix(ending) for name in found for ending in _ENDINGS if name.endswith(ending)}):
        layer = name.removeprefix(PEFT_PREFIX)
        shape = shapes.get(f"{layer}.weight", ())
        if name == layer or len(shape) != 2 or layer.rpartition(".")[2] not in spec.target_modules:
            raise SnapshotError(f"{where} has an adapter for {layer}, which is none of the model's layers for one")
        expected |= {f"{name}.lora_A.weight": (spec.rank, shape[1]), f"{name}.lora_B.weight": (shape[0], spec.rank)}
    if odd := sorted(expected.keys() ^ found.keys()):
        raise SnapshotError(f"{where} is no adapter: without its counterpart, or with a strange name: {_listed(odd)}")
    for name, tensor in found.items():
        if tensor.shape != expected[name] or tensor.dtype != dtype:
            raise SnapshotError(
                f"{where}: {name} is {tensor.dtype} of shape {tensor.shape}, expected {dtype} of {expected[name]}"
            )
    if (num_bytes := snapshot.path.stat().st_size) != manifest.num_bytes:
        raise SnapshotError(f"{where} has {manifest.num_bytes} bytes, {snapshot.path} has {num_bytes}; pull it again")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    more = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
