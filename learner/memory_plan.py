"""What a rank will keep in memory, and where: from the model's shape and the settings, before anything is allocated.

Measured against real ranks in tests/learner/test_memory.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from learner.token_logprobs import CHUNK_BYTES
from learner.training import TrainSettings

Place = Literal["device", "host"]

GB = 1e9
ITEM_BYTES = {"float32": 4, "bfloat16": 2}
NUM_SNAPSHOTS = 3.5  # of the policy, in memory that is shared with servers on this host, with deltas: learner/publisher
_CHUNKS = 3  # float32 logits of one chunk, their probabilities and their gradient
_BUCKET_ELEMENTS = 50_000_000  # see learner/deepspeed_config.py
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
    chunks_logits: bool = True  # see learner/networks.py

    @property
    def is_frozen(self) -> bool:
        return self.trained == 0


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
    passes: bool = False  # there for part of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    items: Sequence[Item]
    num_ranks: int
    ranks_here: int  # of them on one node, whose host memory they share

    def device_bytes(self, *, with_estimates: bool = False) -> float:
        """Of one rank, where it has a device of its own."""
        return sum(self._counted("device", with_estimates, rank_0=False))

    def host_bytes(self, *, with_estimates: bool = False) -> float:
        """Of the node of rank 0, all ranks there."""
        everyone = sum(self._counted("host", with_estimates, rank_0=False))
        return everyone * self.ranks_here + sum(self._counted("host", with_estimates, rank_0=True))

    def _counted(self, place: Place, with_estimates: bool, *, rank_0: bool) -> Iterator[float]:
        for item in self.items:
            if item.place == place and item.of_rank_0_alone == rank_0 and (with_estimates or not item.is_estimate):
                yield item.num_bytes


def plan_memory(
    settings: TrainSettings, models: Models, *, num_ranks: int, ranks_here: int, has_device: bool
) -> MemoryPlan:
    """has_device: whether ranks have memory beside that of the host."""
    width = ITEM_BYTES[settings.dtype]
    items = [*_trained_items("policy", models.policy, settings, num_ranks)]
    if models.critic is not None:
        items += _trained_items("critic", models.critic, settings, num_ranks)
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


def _trained_items(name: str, shape: ModelShape, settings: TrainSettings, num_ranks: int) -> Iterator[Item]:
    stage, width = settings.zero_stage, ITEM_BYTES[settings.dtype]
    offloads = settings.engine.offload
    parameters_at: Place = "host" if offloads == "all" else "device"
    optimizer_at: Place = "host" if offloads != "none" else "device"
    parameters_share = num_ranks if stage == 3 else 1
    gradients_share = num_ranks if stage >= 2 else 1
    optimizer_share = num_ranks if stage >= 1 else 1
    yield Item(what=f"{name}: parameters", place=parameters_at, num_bytes=shape.parameters * width / parameters_share)
    if stage == 3:  # only then is it shared out
        whole = shape.parameters * width
        yield Item(
            what=f"{name}: whole, while it is loaded", place="host", num_bytes=whole, is_estimate=True, passes=True
        )
    yield Item(what=f"{name}: gradients", place="device", num_bytes=shape.trained * width / gradients_share)
    if stage >= 1:  # the share that this rank updates, in the optimizer's precision
        yield Item(
            what=f"{name}: gradients of its share, float32",
            place=optimizer_at,
            num_bytes=shape.trained * 4 / optimizer_share,
        )
        yield Item(what=f"{name}: float32 masters", place=optimizer_at, num_bytes=shape.trained * 4 / optimizer_share)
    yield Item(what=f"{name}: Adam's moments", place=optimizer_at, num_bytes=shape.trained * 8 / optimizer_share)
    if stage >= 1 and offloads == "none":  # two tensors as large as the share, while torch's Adam works
        updating = shape.trained * 8 / optimizer_share
        yield Item(what=f"{name}: in the optimizer's step", place="device", num_bytes=updating, passes=True)
    if stage >= 1 and num_ranks > 1:
        bucket = min(shape.trained, _BUCKET_ELEMENTS) * width
        yield Item(what=f"{name}: gradients on their way", place="device", num_bytes=bucket, is_estimate=True)
    copied = shape.trained * 12 / optimizer_share
    yield Item(
        what=f"{name}: copy that a checkpoint is written from",
        place="host",
        num_bytes=copied,
        is_estimate=True,
        passes=True,
    )


def _reference_items(models: Models, settings: TrainSettings) -> Iterator[Item]:
    if models.reference is None:
        return
    num_bytes = models.reference.parameters * ITEM_BYTES[settings.dtype]
    yield Item(what="reference", place="host" if settings.kl.reference_offload else "device", num_bytes=num_bytes)
    if settings.kl.reference_offload:
        yield Item(what="reference while it is asked", place="device", num_bytes=num_bytes, passes=True)


def _passing_items(models: Models, settings: TrainSettings) -> Iterator[Item]:
    """What one micro-batch needs; of policy and critic, which take turns, the larger."""
    networks = [models.policy, *([models.critic] if models.critic is not None else [])]
    tokens = settings.micro_batch_tokens
    yield Item(
        what=f"activations of {tokens:,} tokens, about",
        place="device",
        num_bytes=max(_activation_bytes(shape, settings) for shape in networks),
        is_estimate=True,
        passes=True,
    )
    policy = models.policy
    logits = _CHUNKS * (CHUNK_BYTES if policy.chunks_logits else 4 * tokens * policy.vocabulary)
    head_gradient = 4 * policy.vocabulary * policy.hidden
    yield Item(
        what="logits of a chunk" if policy.chunks_logits else "all logits of a micro-batch",
        place="device",
        num_bytes=min(logits, _CHUNKS * 4 * tokens * policy.vocabulary) + head_gradient,
        is_estimate=True,
        passes=True,
    )


def _activation_bytes(shape: ModelShape, settings: TrainSettings) -> float:
    a_layer = _ROUNDED_WIDTHS * shape.hidden + _ROUNDED_INNER * shape.inner
    kept = shape.layers * shape.hidden + a_layer if settings.engine.activation_checkpointing else shape.layers * a_layer
    return kept * settings.micro_batch_tokens * ITEM_BYTES[settings.dtype]
