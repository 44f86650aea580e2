"""Prompts that are computed once: whether the networks of a run can, and why not."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from learner.engine_settings import EngineSettings
from learner.networks import Network
from learner.packing import can_share
from learner.segments import KIND_OF_ATTENTION, let_rows_be_segmented

logger = logging.getLogger(__name__)


def share_prompts_where_possible(networks: Sequence[Network], settings: EngineSettings, device: torch.device) -> None:
    """All networks or none, since batches are cut for all alike; says which, and why none."""
    reasons = (_against_network(network, device) for network in networks)
    reason = _against(settings) or next(filter(None, reasons), None)
    for network in networks:
        network.arrangement = replace(network.arrangement, shares=reason is None)
    if reason is None:
        logger.info("a prompt is computed once for all trajectories that begin with it")
    else:
        logger.info("a prompt is computed anew for each of its trajectories: %s", reason)


def _against(settings: EngineSettings) -> str | None:
    if settings.share_prompts == "never":
        return "--share-prompts never"
    if not settings.packing:
        return "--packing false"
    return "--sequence-parallel spreads rows over ranks" if settings.sequence_parallel > 1 else None


def _against_network(network: Network, device: torch.device) -> str | None:
    body: Any = network.body
    name, attention = type(body).__name__, body.config._attn_implementation
    if attention != KIND_OF_ATTENTION:
        return f"the attention of {name} is {attention}, and not {KIND_OF_ATTENTION}"
    if not body._supports_attention_backend or not _takes_anything(body):
        return f"{name} has an attention of its own"
    if sees_a_window(body.config):
        return f"{name} has layers in which a token does not see all tokens before it"
    let_rows_be_segmented()
    if not can_share(body, body.config.vocab_size, device):
        return f"{name} says something else of trajectories whose prompt stands once"
    return None


def _takes_anything(body: Any) -> bool:
    """And may hand it on to attention."""
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(body.forward).parameters.values())


def sees_a_window(config: Any) -> bool:
    """Which a check on a short example would not notice."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    return bool(kinds - {"full_attention"}) or any(
        getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")
    )
