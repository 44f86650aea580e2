"""Ranks that compute one part of a batch together: what they can share, and who shares with whom.

Ranks of a part follow one another, so that on one node they are where communication is fast.
"""

from typing import Any

from transformers import AutoConfig

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.ranks import Alone, GlooRanks, Ranks, new_group
from learner.sequence_parallel import KINDS_OF_ATTENTION, SequenceRanks
from learner.training import TrainSettings

_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that depend on the longest position that a rank sees


def check_parallelism(settings: TrainSettings, num_ranks: int) -> None:
    """Raises UserError when so many ranks cannot share as the settings say, or the model's heads cannot be shared."""
    engine = settings.engine
    if num_ranks % engine.ranks_per_part:
        raise UserError(
            f"{engine.parallel_flag} needs a number of ranks that is a multiple of {engine.ranks_per_part}, got "
            f"{num_ranks}; --ranks, or the launcher, says how many there are"
        )
    if engine.sequence_parallel > 1:
        for name in {settings.model, settings.critic_model, settings.kl.reference_model} - {None}:
            _check_sequence_parallel(str(name), engine)


def _text_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {error}") from error


def _check_sequence_parallel(name: str, engine: EngineSettings) -> None:
    config, size = _text_config(name), engine.sequence_parallel
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


def open_parts(ranks: Ranks, engine: EngineSettings) -> tuple[Ranks, SequenceRanks | None]:
    """(the ranks with other parts of a batch, those with stretches of the same sequences); all ranks call it."""
    size = engine.ranks_per_part
    if size == 1:
        return ranks, None
    timeout_s = engine.rank_timeout_s
    across = [range(first, ranks.size, size) for first in range(size)]
    parts = GlooRanks(timeout_s=timeout_s, members=across) if ranks.size > size else Alone()
    together = [range(first, first + size) for first in range(0, ranks.size, size)]
    return parts, SequenceRanks(new_group(together, timeout_s=timeout_s))
