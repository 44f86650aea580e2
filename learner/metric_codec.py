"""Metrics as bytes: what ranks tell each other of their parts of a batch."""

import msgspec

from learner.algorithms.metrics import (
    EffectiveShare,
    ExplainedVariance,
    Largest,
    Mean,
    Metric,
    Smallest,
    Spread,
    Sum,
    merge,
)
from learner.ranks import Ranks

_KINDS: dict[str, type[Metric]] = {
    kind.__name__: kind for kind in (EffectiveShare, ExplainedVariance, Largest, Mean, Smallest, Spread, Sum)
}


def encode_metrics(metrics: dict[str, Metric]) -> bytes:
    return msgspec.msgpack.encode(
        {name: (type(each).__name__, msgspec.to_builtins(each)) for name, each in metrics.items()}
    )


def decode_metrics(data: bytes) -> dict[str, Metric]:
    return {
        name: msgspec.convert(fields, type=_KINDS[kind])
        for name, (kind, fields) in msgspec.msgpack.decode(data).items()
    }


def merged_over(ranks: Ranks, metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Those of all ranks together, the same to the last bit on each."""
    if ranks.size == 1:
        return metrics
    return merge(decode_metrics(part) for part in ranks.gather(encode_metrics(metrics)))
