"""What a rank will keep in memory, and where: from the model's shape and the settings, before anything is allocated.

Measured against real ranks in tests/learner/test_memory.py.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from learner.token_logprobs import CHUNK_BYTES
from learner.training import TrainSettings

Place = Literal["device", "host"]
When = Literal["always", "while it is loaded", "in forward and backward pass", "in the optimizer's step"]

GB = 1e9
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
NUM_SNAPSHOTS = 3.5  # of the policy, in memory that is shared with servers on this host, with deltas: learner/publisher
_CHUNKS = 3  # float32 logits of one chunk, their probabilities and their gradient
_BUCKET_ELEMENTS = 50_000_000  # see learner/deepspeed_config.py
_LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: gathered and kept until they are used again
_ROUNDED_WIDTHS = 12  # activations of a layer as wide as the hidden state that the backward pass reads, about
_ROUNDED_INNER = 4  # and as wide as the inner one


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What memory depends on."""

    parameters: int
    trained: int  # fewer with adapters
    layers: int
    hidden: int
    inner: int  # of a layer's two products in turn
    vocabulary: int
    split: int = 0  # of the parameters, those in layers that tensor parallelism splits
    chunks_logits: bool = True  # see learner/networks.py

    @property
    def is_frozen(self) -> bool:
        return self.trained == 0

    def of_one_of(self, ranks: int) -> "ModelShape":
        """What of it is on one of the ranks that have a part of each layer each, without adapters."""
        elsewhere = self.split - self.split // ranks
        return replace(self, parameters=self.parameters - elsewhere, trained=self.trained - elsewhere)


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    policy: ModelShape
    critic: ModelShape | None = None
    reference: ModelShape | None = None  # that takes memory of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """num_bytes of each rank. An estimate says how much it will be about; all else is known."""

    what: str
    place: Place
    num_bytes: float
    is_estimate: bool = False
    of_rank_0_alone: bool = False
    when: When = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    items: Sequence[Item]
    num_ranks: int
    ranks_here: int  # of them on one node, whose host memory they share

    def device_bytes(self, *, with_estimates: bool = False) -> float:
        """Of one rank, where it has a device of its own, when it has most."""
        return self._most("device", with_estimates, rank_0=False)

    def host_bytes(self, *, with_estimates: bool = False) -> float:
        """Of the node of rank 0, all ranks there."""
        everyone = self._most("host", with_estimates, rank_0=False)
        return everyone * self.ranks_here + self._most("host", with_estimates, rank_0=True)

    def _most(self, place: Place, with_estimates: bool, *, rank_0: bool) -> float:
        counted = [
            item
            for item in self.items
            if item.place == place and item.of_rank_0_alone == rank_0 and (with_estimates or not item.is_estimate)
        ]
        return most_at_once(counted)


def most_at_once(items: Iterable[Item]) -> float:
    """Bytes of what is always there, and of the phase that takes most besides: of phases, one follows another."""
    by_phase: dict[When, float] = defaultdict(float)
    for item in items:
        by_phase[item.when] += item.num_bytes
    always = by_phase.pop("always", 0.0)
    return always + max(by_phase.values(), default=0.0)


def plan_memory(
    settings: TrainSettings, models: Models, *, num_ranks: int, ranks_here: int, has_device: bool
) -> MemoryPlan:
    """has_device: whether ranks have memory beside that of the host."""
    width, split_over = ITEM_BYTES[settings.dtype], settings.engine.tensor_parallel
    trained = [("policy", models.policy), *([("critic", models.critic)] if models.critic is not None else [])]
    items = [
        item
        for name, shape in trained
        for item in _trained_items(
            name, shape, settings, sharers=max(num_ranks // split_over, 1), has_device=has_device
        )
    ]
    items += _reference_items(models, settings)
    items += _passing_items(models, settings)
    items += [
        Item(
            what="snapshots for rollout servers",
            place="host",
            num_bytes=width * _published_elements(models.policy, settings),
            of_rank_0_alone=True,
        ),
    ]
    if not has_device:
        items = [replace(item, place="host") for item in items]
    return MemoryPlan(items=[item for item in items if item.num_bytes], num_ranks=num_ranks, ranks_here=ranks_here)


def _published_elements(policy: ModelShape, settings: TrainSettings) -> float:
    """That are kept for servers: with adapters also the model that these stand beside, once."""
    if settings.publishes_adapters:
        return policy.parameters + NUM_SNAPSHOTS * policy.trained
    return NUM_SNAPSHOTS * policy.parameters


def _trained_items(
    name: str, whole: ModelShape, settings: TrainSettings, *, sharers: int, has_device: bool
) -> Iterator[Item]:
    """sharers: ranks that ZeRO shares out to."""
    shape = whole.of_one_of(settings.engine.tensor_parallel)
    stage, width = settings.zero_stage, ITEM_BYTES[settings.dtype]
    offloads = settings.engine.offload
    parameters_at: Place = "host" if offloads == "all" else "device"
    optimizer_at: Place = "host" if offloads != "none" else "device"
    parameters = shape.parameters * width
    yield Item(what=f"{name}: parameters", place=parameters_at, num_bytes=parameters / (sharers if stage == 3 else 1))
    if stage == 3 or shape != whole:
        num_bytes = whole.parameters * width
        yield Item(
            what=f"{name}: all parameters",
            place="host",
            num_bytes=num_bytes,
            is_estimate=True,
            when="while it is loaded",
        )
    if stage == 3:
        gathered = min(shape.parameters, _set_in_file(settings, "stage3_max_live_parameters", _LIVE_PARAMETERS)) * width
        yield Item(
            what=f"{name}: other ranks' parameters, gathered",
            place="device",
            num_bytes=gathered,
            when="in forward and backward pass",
        )
    yield from _gradient_items(name, shape, settings, sharers=sharers, has_device=has_device)
    optimizer_share = sharers if stage >= 1 else 1
    if stage >= 1:  # the share that this rank updates, in the optimizer's precision
        yield Item(what=f"{name}: float32 masters", place=optimizer_at, num_bytes=shape.trained * 4 / optimizer_share)
    yield Item(what=f"{name}: Adam's moments", place=optimizer_at, num_bytes=shape.trained * 8 / optimizer_share)
    if stage >= 1 and offloads == "none":  # two tensors as large as the share, while torch's Adam works
        updating = shape.trained * 8 / optimizer_share
        yield Item(what=f"{name}: of the update", place="device", num_bytes=updating, when="in the optimizer's step")
    yield Item(
        what=f"{name}: copy that a checkpoint is written from",
        place="host",
        num_bytes=shape.trained * 12 / optimizer_share,
        is_estimate=True,
    )


def _gradient_items(
    name: str, shape: ModelShape, settings: TrainSettings, *, sharers: int, has_device: bool
) -> Iterator[Item]:
    """Backward passes add to them; at stage 0 and 3 they stay. In the step there is a float32 copy of the share."""
    stage, width, trained = settings.zero_stage, ITEM_BYTES[settings.dtype], shape.trained
    stays: When = "always" if stage in (0, 3) else "in forward and backward pass"
    num_bytes = trained * width / (sharers if stage >= 2 else 1)
    yield Item(what=f"{name}: gradients", place="device", num_bytes=num_bytes, when=stays)
    if stage == 0:
        return
    share = trained * 4 / sharers
    of_share = f"{name}: gradients of its share, float32"
    if settings.engine.offload != "none":
        yield Item(what=of_share, place="host", num_bytes=share)
    else:
        if stage < 3:
            yield Item(what=of_share, place="device", num_bytes=share, when="in forward and backward pass")
        yield Item(what=of_share, place="device", num_bytes=share, when="in the optimizer's step")
    elements = _set_in_file(settings, "reduce_bucket_size", _BUCKET_ELEMENTS)
    used = min(trained, elements) * width if stage == 3 or sharers > 1 else 0
    bucket = elements * width if has_device else used  # a host gives only the pages that are used
    yield Item(what=f"{name}: bucket of gradients", place="device", num_bytes=bucket)
    if stage == 3:
        yield Item(
            what=f"{name}: gradients on their way",
            place="device",
            num_bytes=used,
            when="in forward and backward pass",
        )


def _set_in_file(settings: TrainSettings, key: str, usual: int) -> int:
    """Of ZeRO's settings, in a user's file for DeepSpeed."""
    value = settings.engine.deepspeed.get("zero_optimization", {}).get(key, usual)
    return usual if value == "auto" else int(value)


def _reference_items(models: Models, settings: TrainSettings) -> Iterator[Item]:
    if models.reference is None:
        return
    num_bytes = models.reference.parameters * ITEM_BYTES[settings.dtype]
    yield Item(what="reference", place="host" if settings.kl.reference_offload else "device", num_bytes=num_bytes)
    if settings.kl.reference_offload:
        yield Item(
            what="reference while it is asked",
            place="device",
            num_bytes=num_bytes,
            when="in forward and backward pass",
        )


def _passing_items(models: Models, settings: TrainSettings) -> Iterator[Item]:
    """What one micro-batch needs; of policy and critic, which take turns, the larger."""
    networks = [models.policy, *([models.critic] if models.critic is not None else [])]
    tokens = settings.micro_batch_tokens
    yield Item(
        what=f"activations of {tokens:,} tokens, about",
        place="device",
        num_bytes=max(_activation_bytes(shape, settings) for shape in networks),
        is_estimate=True,
        when="in forward and backward pass",
    )
    policy = models.policy
    logits = _CHUNKS * (CHUNK_BYTES if policy.chunks_logits else 4 * tokens * policy.vocabulary)
    head_gradient = 4 * policy.vocabulary * policy.hidden
    yield Item(
        what="logits of a chunk" if policy.chunks_logits else "all logits of a micro-batch",
        place="device",
        num_bytes=min(logits, _CHUNKS * 4 * tokens * policy.vocabulary) + head_gradient,
        is_estimate=True,
        when="in forward and backward pass",
    )


def _activation_bytes(shape: ModelShape, settings: TrainSettings) -> float:
    a_layer = _ROUNDED_WIDTHS * shape.hidden + _ROUNDED_INNER * shape.inner
    kept = shape.layers * shape.hidden + a_layer if settings.engine.activation_checkpointing else shape.layers * a_layer
    return kept * settings.micro_batch_tokens * ITEM_BYTES[settings.dtype]
