"""What the learner and its coordinator say to each other, on a local socket."""

from typing import Annotated

from msgspec import Meta

from common.messages import (
    MAX_EVALUATION_TASKS,
    MAX_GROUP_SIZE,
    MAX_TOKENS,
    AdapterNeeds,
    Address,
    Count,
    EvaluatedEpisode,
    GroupHeader,
    Id,
    JsonBytes,
    Message,
    Name,
    PayloadMessage,
    Seconds,
    Text,
    Version,
)


class OpenRun(Message, frozen=True, tag="OpenRun"):
    """The learner starts or resumes; answered by RunOpened."""

    version: Version
    model_fingerprint: Name
    tokenizer_fingerprint: Name
    max_model_len: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    vocab_size: Annotated[int, Meta(ge=1, le=1 << 31)]
    dtype: Name  # of the weights that will be published
    weights_address: Address
    frontier: JsonBytes  # what Frontier said when the checkpoint was taken; empty for a new run
    published_version: Version = -1  # the newest that servers may have loaded, when a coordinator is replaced
    adapters: AdapterNeeds | None = None  # for Welcome


class RunOpened(Message, frozen=True, tag="RunOpened"):
    listen_address: Address  # as bound, with the port that was chosen


class TakeBatch(Message, frozen=True, tag="TakeBatch"):
    """The learner can train version `version` now; answered by Batch when one is complete."""

    version: Version


class Batch(PayloadMessage, frozen=True, tag="Batch"):
    """Groups for the step that updates `version`, in task order; the payload holds their tokens in the same order.

    The batch is complete when part num_parts - 1 has come; parts come in order, part 0 begins the batch anew.
    """

    version: Version
    groups: Annotated[tuple[GroupHeader, ...], Meta(min_length=1, max_length=1 << 16)]
    part: Count = 0
    num_parts: Annotated[int, Meta(ge=1, le=1 << 24)] = 1


class StepCompleted(Message, frozen=True, tag="StepCompleted"):
    """The optimizer step is done: `version` is the new one, `lease_ids` were trained."""

    version: Version
    lease_ids: Annotated[tuple[Id, ...], Meta(max_length=1 << 16)]


class SnapshotPublished(Message, frozen=True, tag="SnapshotPublished"):
    """Snapshot `version` can be pulled."""

    version: Version


class TakeFrontier(Message, frozen=True, tag="TakeFrontier"):
    """Asks for what a checkpoint must hold of the coordinator; answered by Frontier."""


class Frontier(Message, frozen=True, tag="Frontier"):
    version: Version
    frontier: JsonBytes


class ServerStatus(Message, frozen=True):
    """One rollout server, as the operator wants to see it."""

    server: Name
    loaded_version: Version
    running_groups: Count
    generated_tokens: Count
    busy_s: Seconds
    paused_s: Seconds
    silent_s: Seconds  # since it was last heard of
    doing: Text
    out_of_service: Text = ""
    updates: Count = 0
    pulled_bytes: Count = 0


class CoordinatorStatus(Message, frozen=True, tag="CoordinatorStatus"):
    """Sent to the learner about once a second; counts are since the run began."""

    servers: Annotated[tuple[ServerStatus, ...], Meta(max_length=1 << 14)]
    leased: Count
    running: Count
    queued: Count
    queued_bytes: Count
    trained: Count
    failed: dict[Name, Count]
    cancelled: dict[Name, Count]
    expired: Count
    refused: dict[Name, Count]
    depth: Count  # groups that may be open at once, as it adapts
    staleness_tokens: dict[Count, Count]  # age in policy versions when trained -> sampled tokens
    in_flight_tokens: dict[Count, Count]  # likewise, the part of the age until the group was accepted
    in_queue_tokens: dict[Count, Count]  # likewise, the part from then on
    waiting_for: Text  # what the learner waits for, by name; empty when a batch is ready
    held_by: Name = ""  # the bound that keeps leases from all servers; empty when none does
    servers_wait_for: Text = ""  # likewise, for people
    evaluation: Text = ""  # how far one that is under way is, for people


class CheckpointSaved(Message, frozen=True, tag="CheckpointSaved"):
    """A checkpoint at `version`, with the frontier of that version, is safe on disk."""

    version: Version


class EvaluateVersion(Message, frozen=True, tag="EvaluateVersion"):
    """Evaluate this version, or the next one that servers have; answered by EvaluationReport. A new one replaces one
    that is under way."""

    version: Version


class EvaluatedTask(Message, frozen=True):
    task_id: Id
    episodes: Annotated[tuple[EvaluatedEpisode, ...], Meta(min_length=1, max_length=MAX_GROUP_SIZE)]


class EvaluationReport(Message, frozen=True, tag="EvaluationReport"):
    """Every token of these tasks was sampled by `version`."""

    asked_version: Version
    version: Version  # snapshot.NO_VERSION when none was begun
    tasks: Annotated[tuple[EvaluatedTask, ...], Meta(max_length=MAX_EVALUATION_TASKS)]
    failed: dict[Name, Count]  # tasks that were given up, by kind of their last failure
    unfinished: Count  # tasks
    reason: Text = ""  # why any are unfinished


class CloseRun(Message, frozen=True, tag="CloseRun"):
    """The learner is done: tell the servers and exit."""

    reason: Text


LearnerToCoordinator = (
    OpenRun
    | TakeBatch
    | StepCompleted
    | SnapshotPublished
    | TakeFrontier
    | CheckpointSaved
    | CloseRun
    | EvaluateVersion
)
CoordinatorToLearner = RunOpened | Batch | Frontier | CoordinatorStatus | EvaluationReport
