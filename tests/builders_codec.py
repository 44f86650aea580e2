"""Builders for what travels: groups, and a valid message of every kind."""

from typing import get_args

import msgspec
import numpy as np

from common import messages
from common.messages import CoordinatorToServer, ServerToCoordinator
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory
from common.weight_messages import ServerToSnapshots, SnapshotsToServer
from learner.coordinator.messages import CoordinatorToLearner, LearnerToCoordinator
from learner.snapshot_messages import LearnerToSnapshots, SnapshotsToLearner

UNIONS: dict[str, object] = {
    "ServerToCoordinator": ServerToCoordinator,
    "CoordinatorToServer": CoordinatorToServer,
    "LearnerToCoordinator": LearnerToCoordinator,
    "CoordinatorToLearner": CoordinatorToLearner,
    "ServerToSnapshots": ServerToSnapshots,
    "SnapshotsToServer": SnapshotsToServer,
    "LearnerToSnapshots": LearnerToSnapshots,
    "SnapshotsToLearner": SnapshotsToLearner,
}
"""The messages of each direction."""


def a_trajectory(
    *, loss_mask: tuple[bool, ...] = (False, True, True), versions: tuple[int, ...] = (3, 4)
) -> Trajectory:
    """Token i has id i + 10 and, if sampled, log-probability -(i + 1) / 8; versions are those of the sampled tokens."""
    mask = np.array(loss_mask)
    token_versions = np.full(mask.size, NOT_SAMPLED, np.int32)
    token_versions[mask] = versions
    return Trajectory(
        token_ids=np.arange(10, 10 + mask.size, dtype=np.int32),
        loss_mask=mask,
        behavior_logprobs=np.where(mask, -np.arange(1, mask.size + 1) / 8, 0).astype(np.float32),
        token_versions=token_versions,
        reward=1.0,
        finish_reason=FinishReason.TERMINATED,
    )


def a_group(*trajectories: Trajectory, lease_id: int = 7, task_id: int = 5) -> Group:
    return Group(lease_id=lease_id, task_id=task_id, trajectories=trajectories or (a_trajectory(), a_trajectory()))


def a_group_header() -> messages.GroupHeader:
    """Of one trajectory of 3 tokens, the last two sampled by versions 3 and 4."""
    trajectory = messages.TrajectoryHeader(
        num_tokens=3, reward=1.0, terminated=True, turns=1, version_runs=((3, 1), (4, 1))
    )
    return messages.GroupHeader(lease_id=7, task_id=5, trajectories=(trajectory,))


def examples_of(union: object) -> list[messages.Message]:
    """One valid message of each kind in the union, every field filled, whatever fields the kinds have by now."""
    return [example(msgspec.inspect.type_info(kind)) for kind in get_args(union) or (union,)]


def example(of: msgspec.inspect.Type) -> object:
    match of:
        case msgspec.inspect.StructType(cls=cls, fields=fields):
            return cls(**{field.name: example(field.type) for field in fields})
        case msgspec.inspect.IntType(ge=ge):
            return max(ge or 0, 2)
        case msgspec.inspect.FloatType(le=le):
            return 0.5 if le is None else min(0.5, le)
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.StrType():
            return "text"
        case msgspec.inspect.BytesType(min_length=min_length):
            return b"x" * (min_length or 3)
        case msgspec.inspect.VarTupleType(item_type=item_type):
            return (example(item_type), example(item_type))
        case msgspec.inspect.TupleType(item_types=item_types):
            return tuple(example(item_type) for item_type in item_types)
        case msgspec.inspect.DictType(key_type=key_type, value_type=value_type):
            return {example(key_type): example(value_type)}
        case msgspec.inspect.LiteralType(values=values):
            return values[0]
        case msgspec.inspect.UnionType(types=types):
            return example(types[0])
    raise NotImplementedError(f"no example of {of}")
