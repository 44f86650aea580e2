"""How the networks of a run lay out their micro-batches: all alike, since batches are cut for all of them together."""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.networks import CriticNetwork, Network, PolicyNetwork
from learner.packing import can_pack, can_spread
from learner.prompt_sharing import share_prompts_where_possible
from learner.ranks import Ranks
from learner.reference import Reference, ReferencePolicy
from learner.sequence_parallel import SequenceRanks, let_rows_be_spread

logger = logging.getLogger(__name__)


def arrange(
    policy: PolicyNetwork,
    critic: CriticNetwork | None,
    reference: Reference | None,
    settings: EngineSettings,
    device: torch.device,
    sequence_ranks: SequenceRanks | None,
    all_ranks: Ranks,
) -> None:
    """As the settings say and all of them can; raises UserError on all ranks for one that cannot be spread."""
    own = reference if isinstance(reference, ReferencePolicy) else None  # another one is the policy itself
    trained: list[Network] = [policy] if critic is None else [policy, critic]
    with nullcontext() if own is None else own.on_device():
        networks = trained if own is None else [*trained, own.network]
        if settings.packing:
            pack_where_possible(networks, device)
        if sequence_ranks is not None:
            spread_sequences(trained, device, sequence_ranks, all_ranks)
            if own is not None:  # a model like the policy
                own.network.arrangement = replace(own.network.arrangement, ranks=sequence_ranks)
        share_prompts_where_possible(networks, settings, device)


def pack_where_possible(networks: Sequence[Network], device: torch.device) -> None:
    """All or none: what is cut for packed rows may need many times the memory where it is padded."""
    mixing = [network for network in networks if not can_pack(network.body, network.body.config.vocab_size, device)]
    for network in networks:
        network.arrangement = replace(network.arrangement, packs=not mixing)
    if mixing:
        names = ", ".join(sorted({type(network.body).__name__ for network in mixing}))
        logger.warning("%s: trajectories in one row would be mixed up, so all are padded instead", names)


def spread_sequences(networks: Sequence[Network], device: torch.device, ranks: SequenceRanks, all_ranks: Ranks) -> None:
    """Over these ranks, from now on; raises UserError on all ranks for a model that would then say something else."""
    let_rows_be_spread()
    for network in networks:
        spread = replace(network.arrangement, ranks=ranks)
        can = can_spread(network.body, network.body.config.vocab_size, device, spread)
        if all_ranks.saying(not can):
            raise UserError(
                f"{type(network.body).__name__} says something else of sequences that are spread over ranks; without "
                "--sequence-parallel it can be trained"
            )
        network.arrangement = spread
