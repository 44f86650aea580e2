"""What bench_dataplane sends: groups of trajectories of 256 + 1,024 tokens, and the messages that fulfil leases."""

from collections.abc import Iterable, Iterator

import msgspec
import numpy as np
import zmq

from common.codec import BYTES_PER_TOKEN, pack_group
from common.messages import GroupHeader, GroupsFinished
from common.staleness import NOT_SAMPLED
from common.together import in_messages, join_payloads
from common.trajectory import FinishReason, Group, Trajectory
from learner.coordinator.replay_queue import header_bytes

PROMPT_TOKENS, SAMPLED_TOKENS = 256, 1024
TOKENS = PROMPT_TOKENS + SAMPLED_TOKENS
TRAJECTORY_BYTES = TOKENS * BYTES_PER_TOKEN
VOCAB_SIZE = 32_000


def group_bytes(group_size: int) -> int:
    """What a group counts in the queue."""
    return group_size * TRAJECTORY_BYTES + header_bytes(group_size, group_size)


def a_group(group_size: int) -> Group:
    """All of it sampled by version 0; random, as real ids and log-probabilities are."""
    rng = np.random.default_rng(0)
    mask = np.arange(TOKENS) >= PROMPT_TOKENS
    return Group(
        lease_id=0,
        task_id=0,
        trajectories=tuple(
            Trajectory(
                token_ids=rng.integers(0, VOCAB_SIZE, TOKENS, dtype=np.int32),
                loss_mask=mask,
                behavior_logprobs=np.where(mask, -rng.exponential(1.0, TOKENS), 0.0).astype(np.float32),
                token_versions=np.where(mask, 0, NOT_SAMPLED).astype(np.int32),
                reward=float(sample % 2),
                finish_reason=FinishReason.TERMINATED,
            )
            for sample in range(group_size)
        ),
    )


class GroupMaker:
    """Messages that fulfil leases. The payloads are made once: what sampling costs is not measured here."""

    def __init__(self, group_size: int) -> None:
        self._header, self._payload = pack_group(a_group(group_size))
        self._payloads: dict[int, zmq.Frame] = {}  # by number of groups

    def messages(self, leases: Iterable[tuple[int, int]], version: int) -> Iterator[tuple[bytes, zmq.Frame]]:
        """Header and payload. leases: with their tasks."""
        runs = ((version, SAMPLED_TOKENS),)
        trajectories = tuple(
            msgspec.structs.replace(trajectory, version_runs=runs) for trajectory in self._header.trajectories[:1]
        ) * len(self._header.trajectories)
        for some in in_messages(leases, lambda _: len(self._payload)):
            groups = tuple(
                GroupHeader(lease_id=lease_id, task_id=task_id, trajectories=trajectories) for lease_id, task_id in some
            )
            yield msgspec.msgpack.encode(GroupsFinished(groups=groups)), self._payload_of(len(groups))

    def _payload_of(self, num_groups: int) -> zmq.Frame:
        if num_groups not in self._payloads:
            payload = join_payloads((self._header,) * num_groups, (self._payload,) * num_groups)
            self._payloads[num_groups] = zmq.Frame(payload)
        return self._payloads[num_groups]
