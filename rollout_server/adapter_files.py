"""An adapter snapshot as the directory that PEFT would have saved it as, which is what engines load."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.snapshot import AdapterSpec
from rollout_server.inference import LocalSnapshot


def write_adapter_directory(snapshot: LocalSnapshot, directory: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors for a snapshot whose manifest says what adapter it is."""
    spec = snapshot.manifest.adapter
    assert isinstance(spec, AdapterSpec)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "target_modules": list(spec.target_modules),
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    data = bytearray(snapshot.path.read_bytes())
    tensors = {
        tensor.name: torch.frombuffer(
            data, dtype=getattr(torch, tensor.dtype), count=torch.Size(tensor.shape).numel(), offset=tensor.offset
        ).view(tensor.shape)
        for tensor in snapshot.manifest.tensors
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
