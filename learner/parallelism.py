"""Ranks that compute one part of a batch together: what they can share, and who shares with whom.

Ranks of a part follow one another, so that on one node they are where communication is fast.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.ranks import Alone, GlooRanks, Ranks, new_group
from learner.sequence_parallel import KINDS_OF_ATTENTION, SequenceRanks
from learner.tensor_parallel import TensorRanks, check_sizes
from learner.training import TrainSettings

_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that depend on the longest position that a rank sees


@dataclass(frozen=True, slots=True)
class Sharing:
    """Whom this rank shares what with."""

    parts: Ranks  # the ranks with other parts of a batch
    sequence_ranks: SequenceRanks | None = None  # those with other stretches of the same sequences
    tensor_ranks: TensorRanks | None = None  # those with other parts of the same layers


def open_sharing(ranks: Ranks, engine: EngineSettings) -> Sharing:
    """All ranks call it, after check_parallelism()."""
    size = engine.ranks_per_part
    if size == 1:
        return Sharing(ranks)
    timeout_s = engine.rank_timeout_s
    across = [range(first, ranks.size, size) for first in range(size)]
    parts = GlooRanks(timeout_s=timeout_s, members=across) if ranks.size > size else Alone()
    together = new_group([range(first, first + size) for first in range(0, ranks.size, size)], timeout_s=timeout_s)
    if engine.tensor_parallel > 1:
        return Sharing(parts, tensor_ranks=TensorRanks(together))
    return Sharing(parts, sequence_ranks=SequenceRanks(together))


def check_parallelism(settings: TrainSettings, num_ranks: int) -> None:
    """Raises UserError when so many ranks cannot share as the settings say, or the models cannot be shared so."""
    engine = settings.engine
    if num_ranks % engine.ranks_per_part:
        raise UserError(
            f"{engine.parallel_flag} needs a number of ranks that is a multiple of {engine.ranks_per_part}, got "
            f"{num_ranks}; --ranks, or the launcher, says how many there are"
        )
    if engine.sequence_parallel > 1:
        for name in {*_trained(settings), settings.kl.reference_model or settings.model}:
            _check_sequence_parallel(name, engine)
    if engine.tensor_parallel > 1:
        for name in _trained(settings):
            check_sizes(name, _config(name), engine.tensor_parallel)
        if len({_config(name).model_type for name in _trained(settings)}) > 1:
            raise UserError(f"{engine.parallel_flag}: critic_model has to be of the same architecture as model")


def _trained(settings: TrainSettings) -> Iterator[str]:
    yield settings.model
    if settings.critic_model is not None:
        yield settings.critic_model


def _config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {error}") from error


def _check_sequence_parallel(name: str, engine: EngineSettings) -> None:
    config, size = _config(name).get_text_config(), engine.sequence_parallel
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (key_heads % size and size % key_heads):
        raise UserError(
            f"{engine.parallel_flag}: {name} has {heads} attention heads, {key_heads} of them for keys and values; the "
            f"first has to be a multiple of the number of ranks, and the second a multiple or a divisor of it"
        )
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if kind in _BY_LENGTH:
        raise UserError(
            f"{engine.parallel_flag}: the rotary embeddings of {name} are {kind}, which depend on a sequence's length, "
            "and no rank sees all of it"
        )


def check_attention(model: Any, engine: EngineSettings) -> None:
    """Of a model that is loaded; raises UserError when what computes its attention cannot be shared."""
    kind = model.config._attn_implementation
    if engine.sequence_parallel > 1 and kind not in KINDS_OF_ATTENTION:
        raise UserError(
            f"{engine.parallel_flag} needs --attention {' or '.join(KINDS_OF_ATTENTION)}, got {kind} for "
            f"{type(model).__name__}"
        )
    takes = inspect.signature(model.base_model.forward).parameters.values()
    if engine.sequence_parallel > 1 and not any(each.kind is each.VAR_KEYWORD for each in takes):
        raise UserError(
            f"{engine.parallel_flag}: {type(model).__name__} takes no keyword arguments that it would hand on to its "
            "attention, which has to be told how sequences are spread"
        )
