"""Builders for the coordinator's tests: valid by default, every value can be overridden."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from common.environments import Environments
from common.messages import (
    PROTOCOL_VERSION,
    GroupHeader,
    GroupsAccepted,
    Heartbeat,
    Hello,
    Leases,
    Message,
    Ready,
    TrajectoryHeader,
)
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory
from learner.coordinator.core import Coordinator
from learner.coordinator.decisions import Decision, GrantLease
from learner.coordinator.messages import OpenRun
from learner.coordinator.replay_queue import FinishedGroup
from learner.coordinator.service_settings import ServiceSettings
from learner.coordinator.settings import CoordinatorSettings

D = TypeVar("D", bound=Decision)

MAX_GROUP_BYTES = 10_000


def some_settings(**overrides: object) -> CoordinatorSettings:
    values: dict[str, object] = {
        "groups_per_step": 2,
        "max_staleness": 1,
        "queue_groups": 100,
        "queue_bytes": 100 * MAX_GROUP_BYTES,
        "max_group_bytes": MAX_GROUP_BYTES,
    }
    return CoordinatorSettings(**(values | overrides))  # type: ignore[arg-type]


def a_coordinator(**overrides: object) -> Coordinator:
    """At version 0, published, nobody there."""
    coordinator = Coordinator(some_settings(**overrides))
    coordinator.published(0, now=0.0)
    return coordinator


def a_group(
    lease_id: int = 0, task_id: int | None = None, *, oldest: int = 0, newest: int | None = None,
    payload_bytes: int = 0, rewards: Sequence[float] = (1.0,),
) -> FinishedGroup:  # fmt: skip
    """By default of the task that has the lease's number, as long as nothing failed. A trajectory for each reward."""
    newest = oldest if newest is None else newest
    trajectories = tuple(
        TrajectoryHeader(num_tokens=2, reward=reward, terminated=True, turns=1, version_runs=((oldest, 1),))
        for reward in rewards
    )
    header = GroupHeader(lease_id=lease_id, task_id=lease_id if task_id is None else task_id, trajectories=trajectories)
    return FinishedGroup(
        header=header,
        payload=bytes(payload_bytes),
        oldest_version=oldest,
        newest_version=newest,
        accepted_version=newest,
    )


def group_for(
    grant: GrantLease, *, sampled_at: int | None = None, payload_bytes: int = 0, rewards: Sequence[float] = (1.0,)
) -> FinishedGroup:
    version = grant.min_version if sampled_at is None else sampled_at
    return a_group(grant.lease_id, grant.task_id, oldest=version, payload_bytes=payload_bytes, rewards=rewards)


def join(
    coordinator: Coordinator, server_id: str = "a", *, groups: int = 100, num_bytes: int = 1 << 30, now: float = 0.0
) -> list[GrantLease]:
    """The server becomes ready and loads what is published; returns the leases granted to anybody."""
    decisions = coordinator.server_ready(server_id, capacity_groups=groups, capacity_bytes=num_bytes, now=now)
    return grants(decisions) + grants(loads(coordinator, server_id, now=now))


def loads(
    coordinator: Coordinator, server_id: str = "a", *, version: int | None = None, now: float = 0.0
) -> list[Decision]:
    """The server says that it has loaded `version`, by default what is published."""
    loaded = coordinator.book.published_version if version is None else version
    return coordinator.heartbeat(server_id, progress=0, loaded_version=loaded, now=now)


def publishes(coordinator: Coordinator, version: int, *, now: float = 0.0) -> list[Decision]:
    """The learner publishes `version`, and all servers load it."""
    decisions = coordinator.published(version, now=now)
    for server_id in list(coordinator.members):
        decisions += loads(coordinator, server_id, now=now)
    return decisions


def grants(decisions: list[Decision]) -> list[GrantLease]:
    return [decision for decision in decisions if isinstance(decision, GrantLease)]


def of_kind(decisions: list[Decision], kind: type[D]) -> list[D]:
    return [decision for decision in decisions if isinstance(decision, kind)]


def some_service_settings(**overrides: object) -> ServiceSettings:
    """Two samples a group, two groups a step, staleness 1."""
    values: dict[str, object] = {
        "run_id": "run",
        "learner_socket": "ipc:///nowhere",
        "listen": "tcp://127.0.0.1:0",
        "rules": some_settings(),
        "model": "tiny",
        "environments": Environments.at("python:tasks:environment").specs,
        "prompts": "prompts.jsonl",
        "journal": "journal.sqlite",
        "lease_secret": "0" * 32,
        "group_size": 2,
        "max_new_tokens": 8,
    }
    return ServiceSettings(**(values | overrides))  # type: ignore[arg-type]


def an_open_run(**overrides: object) -> OpenRun:
    values: dict[str, object] = {
        "version": 0,
        "model_fingerprint": "model-1",
        "tokenizer_fingerprint": "tokenizer-1",
        "max_model_len": 16,
        "dtype": "float32",
        "vocab_size": 100,
        "weights_address": "tcp://127.0.0.1:6000",
        "frontier": b"",
    }
    return OpenRun(**(values | overrides))  # type: ignore[arg-type]


def a_hello(server: str = "a", *, epoch: str = "epoch-1", protocol: int = PROTOCOL_VERSION, said_us: int = 0) -> Hello:
    return Hello(protocol=protocol, server=server, epoch=epoch, said_us=said_us)


def a_ready(**overrides: object) -> Ready:
    values: dict[str, object] = {
        "model_fingerprint": "model-1",
        "tokenizer_fingerprint": "tokenizer-1",
        "capacity_groups": 100,
        "capacity_bytes": 1 << 30,
    }
    return Ready(**(values | overrides))  # type: ignore[arg-type]


def a_heartbeat(**overrides: object) -> Heartbeat:
    values: dict[str, object] = {
        "progress": 1,
        "loaded_version": 0,
        "running_groups": 0,
        "generated_tokens": 5,
        "busy_s": 1.0,
        "paused_s": 0.0,
        "doing": "generating",
    }
    return Heartbeat(**(values | overrides))  # type: ignore[arg-type]


def a_sampled_group(lease_id: int, task_id: int, *, version: int = 0, samples: int = 2, token_id: int = 7) -> Group:
    """A prompt token and two sampled ones in each sample."""
    return Group(
        lease_id=lease_id,
        task_id=task_id,
        trajectories=tuple(
            Trajectory(
                token_ids=np.array([1, token_id, 3], np.int32),
                loss_mask=np.array([False, True, True]),
                behavior_logprobs=np.array([0.0, -0.5, -lease_id - 1.0], np.float32),
                token_versions=np.array([NOT_SAMPLED, version, version], np.int32),
                reward=float(sample),
                finish_reason=FinishReason.TERMINATED,
            )
            for sample in range(samples)
        ),
    )


def one_by_one(message: Message) -> list[Message]:
    """Leases and acknowledgements each by itself, however many came in one message."""
    match message:
        case Leases(leases=leases):
            return list(leases)
        case GroupsAccepted(lease_ids=lease_ids):
            return [GroupsAccepted(lease_ids=(lease_id,)) for lease_id in lease_ids]
    return [message]
