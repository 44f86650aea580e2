"""Before anything large is loaded: what the run will take of memory, said as a table, and refused if it cannot fit."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from common.lifecycle import UserError
from learner.launch import Place, ranks_here
from learner.lora_settings import LoraSettings
from learner.memory_plan import GB, MemoryPlan, Models, ModelShape, plan_memory
from learner.networks import changes_logits
from learner.tensor_parallel import split_parameters
from learner.training import TrainSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What is free, in bytes."""

    host: float
    device: float | None = None  # of each rank; None: ranks have none beside the host's


def check_memory(settings: TrainSettings, place: Place | None, *, free: Memory | None = None) -> MemoryPlan:
    """Says what each rank will keep where; raises UserError when what is certain of it is more than there is.

    What is only estimated is warned about instead, and so is all without settings.engine.check_memory. free: default:
    this node's.
    """
    free = free or free_memory()
    models = shapes_of(settings)
    num_ranks, here = (place.num_ranks, ranks_here(os.environ, place)) if place is not None else (1, 1)

    def plan(settings: TrainSettings) -> MemoryPlan:
        return plan_memory(settings, models, num_ranks=num_ranks, ranks_here=here, has_device=free.device is not None)

    planned = plan(settings)
    logger.info("%s", table(planned, free))
    if (complaint := _shortage(planned, free)) is not None:
        remedies = [f"{flag} takes {_need(plan(other), free)}" for flag, other in _other_settings(settings, num_ranks)]
        sentence = f"{complaint}; to need less: {', '.join(remedies) or '--ranks on more nodes, or a smaller model'}"
        if settings.engine.check_memory:
            raise UserError(f"{sentence}. --check-memory false starts all the same")
        logger.warning("%s", sentence)
    elif (complaint := _shortage(planned, free, with_estimates=True)) is not None:
        logger.warning(
            "%s, activations and what else is estimated included: --micro-batch-tokens below %d, or "
            "--activation-checkpointing, if that turns out true",
            complaint,
            settings.micro_batch_tokens,
        )
    return planned


def table(plan: MemoryPlan, free: Memory) -> str:
    """A line for each item, the largest first, in GB of one rank."""
    lines = [f"memory of each of {plan.num_ranks} ranks, in GB ({plan.ranks_here} on this node)"]
    for item in sorted(plan.items, key=lambda each: (each.place, -each.num_bytes)):
        notes = ("rank 0 alone",) * item.of_rank_0_alone + ("estimated",) * item.is_estimate
        notes += (item.when,) * (item.when != "always")
        said = f" ({', '.join(notes)})" if notes else ""
        lines.append(f"    {item.place:6} {item.num_bytes / GB:9.3f}  {item.what}{said}")
    if free.device is not None:
        certain, about = (plan.device_bytes(with_estimates=each) / GB for each in (False, True))
        lines.append(f"    device {certain:9.3f}  certain, {about:.3f} with estimates, of {free.device / GB:.3f} free")
    certain, about = (plan.host_bytes(with_estimates=each) / GB for each in (False, True))
    lines.append(
        f"    host   {certain:9.3f}  certain on this node, {about:.3f} with estimates, of {free.host / GB:.3f} free"
    )
    return "\n".join(lines)


def _shortage(plan: MemoryPlan, free: Memory, *, with_estimates: bool = False) -> str | None:
    device, host = (each(with_estimates=with_estimates) for each in (plan.device_bytes, plan.host_bytes))
    if free.device is not None and device > free.device:
        return f"a rank needs {device / GB:.2f} GB of its device, and {free.device / GB:.2f} GB are free"
    if host > free.host:
        return f"the ranks on this node need {host / GB:.2f} GB of host memory, and {free.host / GB:.2f} GB are free"
    return None


def _need(plan: MemoryPlan, free: Memory) -> str:
    device = f"{plan.device_bytes() / GB:.2f} GB of the device and " if free.device is not None else ""
    return f"{device}{plan.host_bytes() / GB:.2f} GB of the host"


def _other_settings(settings: TrainSettings, num_ranks: int) -> Iterator[tuple[str, TrainSettings]]:
    """Flags that might help, with what they make of the settings."""
    if settings.dtype == "float32" and settings.zero_stage > 0:
        yield "--dtype bfloat16", replace(settings, dtype="bfloat16")
    if num_ranks > 1 and settings.zero_stage < 3:
        yield "--zero-stage 3", replace(settings, zero_stage=3)
    if torch.cuda.is_available() and settings.engine.offload != "all":
        yield (
            "--zero-stage 3 --offload all",
            replace(settings, zero_stage=3, engine=replace(settings.engine, offload="all")),
        )
    if settings.kl.reference_model is not None and settings.lora is None and torch.cuda.is_available():
        yield "--reference-offload true", replace(settings, kl=replace(settings.kl, reference_offload=True))


def free_memory() -> Memory:
    """Of this node, within the bounds of a container, and of this rank's accelerator."""
    device = float(torch.cuda.mem_get_info()[0]) if torch.cuda.is_available() else None
    known = Path("/proc/meminfo").read_text().splitlines()
    [available] = [line.split()[1] for line in known if line.startswith("MemAvailable:")]
    return Memory(host=min(float(available) * 1024, _left_in_container(Path("/sys/fs/cgroup"))), device=device)


def _left_in_container(cgroup: Path) -> float:
    """Infinite where nothing bounds it. What the kernel only caches is given back when it is needed."""
    with suppress(OSError, ValueError):  # there is none, or its bound is "max"
        bound, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        facts = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return float(bound - used + int(facts["inactive_file"]))
    return float("inf")


def shapes_of(settings: TrainSettings) -> Models:
    """From the models' configurations alone; raises UserError when there is no such model."""
    splits = settings.engine.tensor_parallel > 1
    policy = model_shape(settings.model, lora=settings.lora, splits=splits)
    if settings.value_head:
        head = policy.hidden + 1
        policy = replace(policy, parameters=policy.parameters + head, trained=policy.trained + head)
    critic = None
    if settings.critic_model is not None:
        critic = model_shape(settings.critic_model, kind=AutoModel, splits=splits)
    reference = settings.kl.reference_model
    if reference is None or (reference == settings.model and settings.lora is not None):
        return Models(policy=policy, critic=critic)
    return Models(policy=policy, critic=critic, reference=replace(model_shape(reference), trained=0))


def model_shape(
    name: str, *, kind: Any = AutoModelForCausalLM, lora: LoraSettings | None = None, splits: bool = False
) -> ModelShape:
    """Of a Hugging Face name or directory; splits: whether ranks have parts of its layers."""
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            model = kind.from_config(config)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {error}") from error
    total = sum(parameter.numel() for parameter in model.parameters())
    text: Any = config.get_text_config()
    return ModelShape(
        parameters=total,
        trained=total if lora is None else _adapter_parameters(model, lora),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        vocabulary=text.vocab_size,
        split=split_parameters(model) if splits else 0,
        chunks_logits=not changes_logits(config),
    )


def _adapter_parameters(model: Any, lora: LoraSettings) -> int:
    head = model.get_output_embeddings()
    wanted: Mapping[str, nn.Linear] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and (not lora.target_modules or name.split(".")[-1] in lora.target_modules)
    }
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in wanted.values())
