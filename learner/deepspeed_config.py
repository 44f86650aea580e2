"""The configuration that DeepSpeed is given: ours, with a user's own merged into it."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoConfig

from common.lifecycle import UserError
from learner.engine_settings import Offload
from learner.tensor_parallel import partition_config
from learner.training import TrainSettings

_BUCKET_ELEMENTS = 50_000_000  # gradients reduced, and parameters gathered, at once

_FLAGS = {
    "gradient_clipping": "--max-grad-norm",
    "zero_optimization.stage": "--zero-stage",
    "zero_optimization.offload_optimizer.device": "--offload",
    "zero_optimization.offload_param.device": "--offload",
    "bf16.enabled": "--dtype",
    "optimizer.type": "nothing else",
    "optimizer.params.lr": "--learning-rate",
    "optimizer.params.betas": "--adam-beta1 and --adam-beta2",
    "optimizer.params.weight_decay": "--weight-decay",
    "train_micro_batch_size_per_gpu": "--micro-batch-tokens, by which batches are cut",
    "gradient_accumulation_steps": "--micro-batch-tokens, by which batches are cut",
}
_REFUSED = {
    "train_batch_size": "--groups-per-step and --group-size say how much a step trains on",
    "scheduler": "--lr-schedule, --warmup-steps and --total-steps say how the learning rate goes",
    "sequence_parallel_size": "--sequence-parallel says how many ranks share a sequence",
    "fp16": "--dtype bfloat16 is what trains in 16 bits",
    "tensor_parallel": "--tensor-parallel says how many ranks share a layer",
}


def deepspeed_config(settings: TrainSettings) -> dict[str, Any]:
    """Raises UserError when the user's own says something else than a setting of the learner does."""
    ours = _ours(settings)
    theirs = settings.engine.deepspeed
    for key, instead in _REFUSED.items():
        if key in theirs:
            raise UserError(f"{settings.engine.deepspeed_file}: {key} cannot be set there; {instead}")
    for path, (our_value, their_value) in _conflicts(ours, theirs):
        raise UserError(
            f"{settings.engine.deepspeed_file}: {path} is {their_value!r} there, and {our_value!r} by "
            f"{_FLAGS.get(path, 'the learner itself')}; make them equal, or leave one out"
        )
    return _merged(ours, theirs)


def _ours(settings: TrainSettings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # both unused: batches are cut by tokens, boundaries set by hand
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": {
            "stage": settings.zero_stage,
            **_offload(settings.engine.offload),
            **_buckets(settings.engine.deepspeed),
        },
        **_tensor_parallel(settings),
        "bf16": {"enabled": settings.dtype == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": settings.learning_rate,
                "betas": list(settings.adam_betas),
                "eps": settings.adam_epsilon,
                "weight_decay": settings.weight_decay,
                # DeepSpeed's own has to be compiled first, and pays where the optimizer's state is in host memory.
                **({} if settings.engine.offload != "none" else {"torch_adam": True}),
            },
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


def _offload(offload: Offload) -> dict[str, Any]:
    to_host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        **({"offload_optimizer": to_host} if offload != "none" else {}),
        **({"offload_param": to_host} if offload == "all" else {}),
    }


def _tensor_parallel(settings: TrainSettings) -> dict[str, Any]:
    """Of policy and critic, which transformers splits alike; the output layer stays whole, for chunks of its logits."""
    size = settings.engine.tensor_parallel
    if size == 1:
        return {}
    plan = partition_config(AutoConfig.from_pretrained(settings.model))
    return {"tensor_parallel": {"autotp_size": size, "vocab_parallel_lm_head": False, "partition_config": plan}}


def _buckets(theirs: Mapping[str, Any]) -> dict[str, int]:
    """Smaller than DeepSpeed's own, which take gigabytes; whoever sets one means it."""
    ours = {"reduce_bucket_size": _BUCKET_ELEMENTS, "allgather_bucket_size": _BUCKET_ELEMENTS}
    given = theirs.get("zero_optimization", {})
    return {key: value for key, value in ours.items() if key not in given}


def _conflicts(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(path, (our value, their value)); "auto" is whatever we say, as elsewhere."""
    for key in ours.keys() & theirs.keys():
        one, other = ours[key], theirs[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _conflicts(one, other, f"{prefix}{key}.")
        elif one != other and other != "auto":
            yield f"{prefix}{key}", (one, other)


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(ours)
    for key, value in theirs.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        elif key not in merged or value != "auto":
            merged[key] = value
    return merged
