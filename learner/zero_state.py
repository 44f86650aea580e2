"""Where DeepSpeed keeps what a rank trains: float32 parameters and Adam's moments, by ZeRO stage.

It reads attributes that DeepSpeed 0.19.8 does not document, so its version is pinned; every stage is tested against
plain torch, for a resume too.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from learner.sharded_state import KINDS, Flat, Fragment, SavedState, Shard, ShardedState, Table


class ZeroState:
    """Of one engine, on one rank. `num_steps` counts Adam's steps, which DeepSpeed does not at every stage."""

    def __init__(
        self, engine: Any, module: nn.Module, *, stage: int, shards: Mapping[str, Shard] | None = None
    ) -> None:
        """shards: of parameters that this rank has a part of; at stages 1 and 2."""
        self._engine = engine
        self._stage = stage
        self._trained = {name: each for name, each in module.named_parameters() if each.requires_grad}
        self._shards = shards or {}
        self.num_steps = 0

    def now(self) -> ShardedState:
        """What this rank writes of it, not copied. At stage 0 every rank has everything, and the first writes it."""
        rank = self._engine.global_rank
        holds_it = self._stage > 0 or rank == 0
        table = Table(
            rank=rank,
            num_ranks=self._engine.world_size,
            num_steps=self.num_steps,
            fragments=tuple(each for each in self._fragments() if self._writes(each.name)) if holds_it else (),
            shards=dict(self._shards),
        )
        return ShardedState(table, [self._flat(each) for each in self._masters()] if holds_it else [])

    def _writes(self, name: str) -> bool:
        """Of what ranks with parts of other parameters have all, the first writes it."""
        return name in self._shards or all(shard.index == 0 for shard in self._shards.values())

    def load(self, saved: SavedState) -> None:
        """Raises UserError when the checkpoint does not fit."""
        saved.check_names(self._trained)
        masters = self._masters()
        for master in masters:
            self._prepare_moments(master, saved.num_steps)
        flats = [self._flat(master) for master in masters]
        for fragment in self._fragments():
            place = slice(fragment.flat_start, fragment.flat_start + fragment.num_elements)
            for kind in KINDS:
                tensor: Tensor = getattr(flats[fragment.flat], kind)
                tensor[place] = saved.read(
                    fragment.name, fragment.start, fragment.num_elements, kind, shard=self._shards.get(fragment.name)
                ).to(tensor.device)
        self.num_steps = saved.num_steps
        self._renew_parameters(saved)

    @property
    def _adam(self) -> Any:
        return self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer

    def _masters(self) -> list[Tensor]:
        """What Adam updates: parameters, or float32 partitions of several of them behind one another."""
        if self._stage == 0:
            return list(self._trained.values())
        if self._stage == 3:
            return list(self._engine.optimizer.fp32_partitioned_groups_flat)
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _flat(self, master: Tensor) -> Flat:
        moments = self._adam.state.get(master, {})
        exp_avg, exp_avg_sq = (moments[name].view(-1) if name in moments else None for name in KINDS[1:])
        return Flat(master.data.view(-1), exp_avg, exp_avg_sq)

    def _prepare_moments(self, master: Tensor, num_steps: int) -> None:
        """Adam makes them at its first step, which for a resumed run is behind it."""
        is_torch = isinstance(self._adam, torch.optim.Optimizer) and type(self._adam).__module__.startswith("torch.")
        self._adam.state[master] = {
            "step": torch.tensor(float(num_steps)) if is_torch else num_steps,
            "exp_avg": torch.zeros_like(master.data),
            "exp_avg_sq": torch.zeros_like(master.data),
        }

    def _fragments(self) -> tuple[Fragment, ...]:
        """What of which parameter lies where in the masters of this rank."""
        found = [self._fragment(index, name) for index, name in enumerate(self._trained)]
        return tuple(fragment for fragment in found if fragment is not None and fragment.num_elements > 0)

    def _fragment(self, index: int, name: str) -> Fragment | None:
        parameter: Any = self._trained[name]
        if self._stage == 0:
            return Fragment(name, 0, parameter.numel(), index, 0)
        if self._stage == 3:
            optimizer = self._engine.optimizer
            group, start, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = length * self._engine.global_rank
            return Fragment(name, first, max(min(length, parameter.ds_numel - first), 0), group, start)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        low, high = mapping.lp_fragment_address, mapping.get_hp_fragment_address()
        return Fragment(name, low.start, low.numel, mapping.param_group_index, high.start)

    def _renew_parameters(self, saved: SavedState) -> None:
        """Those that the network computes with, made of the masters anew."""
        if self._stage == 3:
            optimizer = self._engine.optimizer
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if persistent := optimizer.persistent_parameters:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
        elif self._stage > 0:
            for name, parameter in self._trained.items():
                values = saved.read(name, 0, parameter.numel(), shard=self._shards.get(name))
                parameter.data.copy_(values.view(parameter.shape))
