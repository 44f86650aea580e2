"""What rollout servers and the coordinator say to each other, and what all messages between processes have in common.

Those about weights are in weight_messages.py, the learner's to its own children in learner/. A message is two frames: a
MessagePack header, which is one of these structs, and a payload of raw little-endian bytes (empty for most).
The structs carry bounds on every field, so that what decodes is also plausible.

Evolution: a field is only ever appended, with a default; anything else raises PROTOCOL_VERSION, which Hello carries.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from common.environments import MAX_ENVIRONMENTS, EnvironmentSpec
from common.snapshot import MAX_ADAPTER_RANK

PROTOCOL_VERSION = 7

MAX_GROUP_SIZE = 4096
MAX_TOKENS = 1 << 22
MAX_VERSION_RUNS = 1 << 16
MAX_REWARD = 1e9
MAX_EVALUATION_TASKS = 1 << 16
MAX_TOGETHER = 64  # leases, groups or acknowledgements in one message,
MAX_TOGETHER_BYTES = 1 << 18  # of so many bytes, or a single one: see together.py
MAX_RELAY_WEIGHTS = 1 << 10

Name = Annotated[str, Meta(max_length=256)]
Address = Annotated[str, Meta(max_length=512)]
Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Id = Annotated[int, Meta(ge=0, lt=1 << 53)]
Version = Annotated[int, Meta(ge=-1, lt=1 << 31)]  # snapshot.NO_VERSION before the first one
Seconds = Annotated[float, Meta(ge=0.0, le=1e12)]
Finite = Annotated[float, Meta(ge=-MAX_REWARD, le=MAX_REWARD)]  # NaN and infinities do not pass a bound
ContentDigest = Annotated[bytes, Meta(max_length=16)]
PublicKey = Annotated[bytes, Meta(max_length=32)]  # empty where there are no keys
RelayWeights = Annotated[int, Meta(ge=0, le=MAX_RELAY_WEIGHTS)]
Proof = Annotated[bytes, Meta(max_length=64)]
JsonBytes = Annotated[bytes, Meta(max_length=1 << 20)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages. Subclasses are tagged with their own name."""


class PayloadMessage(Message, frozen=True):
    """One with a payload: its second frame may hold something."""


# --- rollout server -> coordinator -------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="Hello"):
    """First message of a rollout server, repeated until answered by Welcome or Refused."""

    protocol: Count
    server: Name  # for people: metrics and logs name the server by it
    epoch: Name  # random per process start: a restarted server is another one
    said_us: Count = 0  # on the server's clock: one that arrives late, over a connection that was cut, is known by it


class HeldLease(Message, frozen=True):
    """A lease that a server still works on, or whose group nobody has acknowledged, as it was granted."""

    lease_id: Id
    task_id: Id
    min_version: Version
    proof: Proof


class Ready(Message, frozen=True, tag="Ready"):
    """The engine is up with the model that Welcome asked for; leases may be granted."""

    model_fingerprint: Name
    tokenizer_fingerprint: Name
    capacity_groups: Annotated[int, Meta(ge=1, le=1 << 20)]
    capacity_bytes: Count
    # Granted by a coordinator before this one, or before the server was given up: it asks to go on with them.
    held: Annotated[tuple[HeldLease, ...], Meta(max_length=1 << 14)] = ()


class Heartbeat(Message, frozen=True, tag="Heartbeat"):
    """Sent about once a second from the work loop, not from an IO thread."""

    progress: Count  # grows whenever the work loop got something done
    loaded_version: Version
    running_groups: Count
    generated_tokens: Count  # since the process started
    busy_s: Seconds  # time with at least one request running and the engine not paused, since the process started
    paused_s: Seconds  # time the engine was paused for weight updates, since the process started
    doing: Text  # one line for people: "generating", "waiting for snapshot 3", ...
    # Why nothing it samples may be used at the moment: its leases fail with this reason, and it is granted no others
    # until it says so no more. Empty while it is in service.
    out_of_service: Text = ""
    updates: Count = 0  # versions loaded since the process started
    pulled_bytes: Count = 0  # of snapshots, since the process started
    holding: Version = -1  # the loaded version, where it stays at that because HoldVersions said so
    relay_address: Address = ""  # where others may pull from it what it has pulled; empty: nowhere
    relay_key: PublicKey = b""  # of the socket there
    lying_relay: Name = ""  # the server whose relay, of all the last, sent this one wrong weights


class TrajectoryHeader(Message, frozen=True, gc=False):  # there are many, and they hold nothing that could hold them
    """One trajectory of a group; its tokens are in the payload, see codec.py."""

    num_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    reward: Finite
    terminated: bool
    turns: Annotated[int, Meta(ge=1, le=1 << 20)]
    version_runs: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=0, lt=1 << 31)], Annotated[int, Meta(ge=1, le=MAX_TOKENS)]], ...],
        Meta(max_length=MAX_VERSION_RUNS),
    ]
    continues: bool = False  # the episode of the trajectory before it, see Trajectory


class GroupHeader(Message, frozen=True, gc=False):
    """One group; a payload holds the tokens of its trajectories in the same order."""

    lease_id: Id
    task_id: Id
    trajectories: Annotated[tuple[TrajectoryHeader, ...], Meta(min_length=1, max_length=MAX_GROUP_SIZE)]


class GroupsFinished(PayloadMessage, frozen=True, tag="GroupsFinished"):
    """Leases are fulfilled. Each group is resent until GroupsAccepted or GroupRefused answers.

    The payload holds the tokens of all their trajectories in the same order, as if they were one group.
    """

    groups: Annotated[tuple[GroupHeader, ...], Meta(min_length=1, max_length=MAX_TOGETHER)]


class LeaseFailed(Message, frozen=True, tag="LeaseFailed"):
    """A lease could not be fulfilled: `kind` is a short stable word for metrics, `reason` is for people."""

    lease_id: Id
    kind: Name
    reason: Text


class EvaluatedEpisode(Message, frozen=True, gc=False):
    """What is told of one episode of an evaluation. Its tokens stay where they were sampled."""

    reward: Finite
    num_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]  # sampled, over all turns
    terminated: bool
    oldest_version: Annotated[int, Meta(ge=0, lt=1 << 31)]  # of its tokens
    newest_version: Annotated[int, Meta(ge=0, lt=1 << 31)]


class Evaluated(Message, frozen=True, tag="Evaluated"):
    """An evaluation task is done. Said once: what is lost with a connection is granted anew."""

    evaluation_id: Id
    task_id: Id
    version: Version
    episodes: Annotated[tuple[EvaluatedEpisode, ...], Meta(min_length=1, max_length=MAX_GROUP_SIZE)]


class EvaluationFailed(Message, frozen=True, tag="EvaluationFailed"):
    """An evaluation task could not be done; kind "version_gone": a newer version than its own is loaded."""

    evaluation_id: Id
    kind: Name
    reason: Text


class Leaving(Message, frozen=True, tag="Leaving"):
    """The server stops; its open leases go to others at once."""

    reason: Text


# --- coordinator -> rollout server -------------------------------------------------------------------------------


class AdapterNeeds(Message, frozen=True):
    """What an engine has to be started for where snapshots are adapters."""

    rank: Annotated[int, Meta(ge=1, le=MAX_ADAPTER_RANK)]
    target_modules: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=256)]  # see snapshot.AdapterSpec
    versions: Annotated[int, Meta(ge=2, le=1 << 16)]  # that may be in use at once

    def __str__(self) -> str:
        return f"rank {self.rank} in {', '.join(self.target_modules)}"


class Welcome(Message, frozen=True, tag="Welcome"):
    """The server belongs to the run. What it must load, and how it must sample."""

    run_id: Name
    session: Name  # random per coordinator start: leases of another session are void
    model: Address  # Hugging Face name or path, as the learner knows it
    model_fingerprint: Name
    tokenizer_fingerprint: Name
    dtype: Name  # of the weights the learner publishes
    environments: Annotated[tuple[EnvironmentSpec, ...], Meta(min_length=1, max_length=MAX_ENVIRONMENTS)]
    max_model_len: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    max_new_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    temperature: Annotated[float, Meta(gt=0.0, le=100.0)]
    weights_address: Address  # where snapshots are pulled from
    published_version: Version
    evaluation_hold_s: Seconds = 0.0  # see HoldVersions
    adapters: AdapterNeeds | None = None  # None: snapshots are the whole policy
    relay_weights: RelayWeights = 0  # servers that each gives its weights on to; 0: all pull from the learner


class Refused(Message, frozen=True, tag="Refused"):
    """The server does not belong here; `reason` says why and what to do. It must not retry unless `retry`."""

    reason: Text
    retry: bool = False


class Lease(Message, frozen=True):
    """A task granted to one server: also its credit for one group of at most `max_group_bytes`."""

    lease_id: Id
    task_id: Id
    environment: Address  # name of one of those in Welcome
    row: JsonBytes  # the dataset row, a JSON object with at least "prompt"
    group_size: Annotated[int, Meta(ge=1, le=MAX_GROUP_SIZE)]
    seed: Id  # sample i of the group uses sample_seed(seed, i)
    min_version: Version  # no token may be sampled by an older policy: it would be too stale when trained
    max_group_bytes: Count
    proof: Proof = b""  # to be shown when the lease is claimed again, see HeldLease


class Leases(Message, frozen=True, tag="Leases"):
    leases: Annotated[tuple[Lease, ...], Meta(min_length=1, max_length=MAX_TOGETHER)]


class LeaseCancelled(Message, frozen=True, tag="LeaseCancelled"):
    """Stop working on the lease; nothing is expected for it any more."""

    lease_id: Id
    reason: Text


class HoldVersions(Message, frozen=True, tag="HoldVersions"):
    """Stay at the first version from `first` to `last` that is loaded, until told otherwise or Welcome's
    evaluation_hold_s have passed since a newer one was there. Evaluation tasks of other versions are void."""

    first: Version
    last: Version


class Evaluate(Message, frozen=True, tag="Evaluate"):
    """A task of an evaluation: nothing of it is trained. It is void when the server says Ready again."""

    evaluation_id: Id
    task_id: Id
    version: Version  # that samples every token
    environment: Address
    row: JsonBytes
    samples: Annotated[int, Meta(ge=1, le=MAX_GROUP_SIZE)]
    seed: Id
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)]  # 0: always the likeliest token


class GroupsAccepted(Message, frozen=True, tag="GroupsAccepted"):
    """The groups of these leases are safe with the coordinator; forget them."""

    lease_ids: Annotated[tuple[Id, ...], Meta(min_length=1, max_length=MAX_TOGETHER)]


class GroupRefused(Message, frozen=True, tag="GroupRefused"):
    """The group will never be taken; forget it."""

    lease_id: Id
    reason: Text


class Pulse(Message, frozen=True, tag="Pulse"):
    """Answer to a Heartbeat, also sent at once when a version is published."""

    published_version: Version
    waiting_for: Text = ""  # what keeps new leases away from this server, for people; empty when nothing does


class RelayPlace(Message, frozen=True):
    """Another rollout server that gives on what it has pulled."""

    server: Name
    address: Address
    key: PublicKey
    level: Annotated[int, Meta(ge=1, le=1 << 14)]  # relays between the one who pulls there and the learner


class RelayPlan(Message, frozen=True, tag="RelayPlan"):
    """Where this server pulls chunks, and whom its own relay lets in, from now on. Manifests are the learner's."""

    source: RelayPlace | None  # None: from the learner
    admitted: Annotated[tuple[PublicKey, ...], Meta(max_length=MAX_RELAY_WEIGHTS)]


class Finished(Message, frozen=True, tag="Finished"):
    """The run is over; the server may exit."""

    reason: Text


ServerToCoordinator = Hello | Ready | Heartbeat | GroupsFinished | LeaseFailed | Leaving | Evaluated | EvaluationFailed
CoordinatorToServer = (
    Welcome
    | Refused
    | Leases
    | LeaseCancelled
    | GroupsAccepted
    | GroupRefused
    | Pulse
    | Finished
    | HoldVersions
    | Evaluate
    | RelayPlan
)
