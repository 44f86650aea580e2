"""Adapters of tiny models, by PEFT: snapshots of them, and what their forward says."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Qwen2ForCausalLM

from common.snapshot import NO_VERSION, AdapterSpec, SnapshotManifest, TensorSpec, build_manifest
from rollout_server.inference import LocalSnapshot
from tests.models import snapshot_bytes

RANK = 4
ALPHA = 8.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def an_adapted_model(
    base: Qwen2ForCausalLM, seed: int, *, rank: int = RANK, alpha: float = ALPHA, targets: tuple[str, ...] = TARGETS
) -> Any:
    """A copy of the base with an adapter that is unlike that of any other seed, and not small."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(
            copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=0.0)
        )
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def write_adapter(path: Path, model: Any, base: SnapshotManifest, *, version: int, **changes: Any) -> LocalSnapshot:
    """As a learner publishes it. changes: what its manifest says otherwise."""
    tensors: list[TensorSpec] = []
    chunks: list[bytes] = []
    for name, tensor in get_peft_model_state_dict(model).items():
        place = sum(map(len, chunks))
        tensors.append(TensorSpec(name=name, shape=tuple(tensor.shape), dtype="float32", offset=place))
        chunks.append(tensor.detach().numpy().tobytes())
    config = model.peft_config["default"]
    spec = {
        "base_model": base.content_digest,
        "rank": config.r,
        "alpha": float(config.lora_alpha),
        "target_modules": tuple(sorted(config.target_modules)),
    }
    data = b"".join(chunks)
    path.write_bytes(data)
    adapter = AdapterSpec(**spec | changes)
    manifest = build_manifest(memoryview(data), tuple(tensors), run_id="test", version=version, adapter=adapter)
    return LocalSnapshot(manifest=manifest, path=path)


def write_base_model(path: Path, base: Qwen2ForCausalLM) -> LocalSnapshot:
    data, tensors = snapshot_bytes(base)
    path.write_bytes(data)
    manifest = build_manifest(memoryview(data), tensors, run_id="test", version=NO_VERSION)
    return LocalSnapshot(manifest=manifest, path=path)
