"""What a PpoEngine leaves in a checkpoint and finds there again, and the policy as Hugging Face lays one out."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from learner.lora_settings import LoraSettings, check_adapters_note, write_adapters_note
from learner.networks import PolicyNetwork
from learner.trainable import Trainable
from learner.training import WriteState

NETWORK_NAMES = ("policy", "critic")  # directories of a checkpoint


def copy_state(
    networks: Sequence[Trainable], own: Mapping[str, Tensor], *, rank: int, lora: LoraSettings | None
) -> WriteState:
    """As it is now; `own` is the rank's, beside its networks. What it returns writes that into a directory."""
    copies = dict(zip(NETWORK_NAMES, [network.copy_state() for network in networks], strict=False))
    tensors = dict(own)

    def write(directory: Path) -> None:
        for name, copy in copies.items():
            copy.write(directory / name)
        save_file(tensors, _own_file(directory, rank))
        if rank == 0:
            write_adapters_note(directory, lora)

    return write


def load_state(
    directory: Path, networks: Sequence[Trainable], *, rank: int, lora: LoraSettings | None
) -> dict[str, Tensor]:
    """Into the networks; returns the rank's own, or rank 0's where there were fewer ranks."""
    check_adapters_note(directory, lora)
    for name, network in zip(NETWORK_NAMES, networks, strict=False):
        network.load(directory / name)
    own = _own_file(directory, rank)
    return load_file(own if own.exists() else _own_file(directory, 0))


def export_huggingface(directory: Path, policy: Trainable, *, model: str, rank: int) -> None:
    """All ranks gather, rank 0 writes. model: whose tokenizer it has."""
    network = policy.module
    assert isinstance(network, PolicyNetwork)
    tensors = _in_host_memory(network.merged_tensors(policy.gathered))
    adapters = _in_host_memory(policy.gathered(network.adapter_parameters()))
    if rank == 0:
        network.export(directory, tensors, adapters)
        AutoTokenizer.from_pretrained(model).save_pretrained(directory)


def _in_host_memory(tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors}


def _own_file(directory: Path, rank: int) -> Path:
    return directory / f"engine-{rank:05d}.safetensors"
