"""What rollout servers and the snapshot server, or another rollout server's relay, say to each other."""

from typing import Literal

from common.messages import ContentDigest, Count, Id, Message, Name, PayloadMessage, Version


class ManifestRequest(Message, frozen=True, tag="ManifestRequest"):
    """Answered by ManifestReply or DeltaReply when a version newer than `newer_than` is published, else by NoNewer.

    Where versions are adapters and the asker's base model is not theirs, by BaseModelReply first.
    """

    newer_than: Version
    held_version: Version = -1  # whose bytes the asker has, as base of a delta; -1: none that it would trust
    base_model: ContentDigest = b""  # of what the asker's engine holds; empty: none


WhyFull = Literal["no base", "base is gone", "a delta does not pay"]


class ManifestReply(PayloadMessage, frozen=True, tag="ManifestReply"):
    """Pull the full snapshot. The payload is its encoded manifest, see snapshot.py."""

    version: Version
    why_full: WhyFull = "no base"


class BaseModelReply(PayloadMessage, frozen=True, tag="BaseModelReply"):
    """Pull what the adapters stand beside, once, as version -1. The payload is its encoded manifest."""


class DeltaReply(PayloadMessage, frozen=True, tag="DeltaReply"):
    """Pull the delta from base_version to version. The payload is its encoded manifest, see delta/manifest.py."""

    version: Version
    base_version: Version


class NoNewer(Message, frozen=True, tag="NoNewer"):
    version: Version


class MappingRequest(Message, frozen=True, tag="MappingRequest"):
    """Where in memory is a version newer than `newer_than`? Answered by MappingReply, NoNewer or OtherHost."""

    newer_than: Version
    host: Name  # see shared_slots.host_id
    base_model: ContentDigest = b""  # see ManifestRequest


class MappingReply(PayloadMessage, frozen=True, tag="MappingReply"):
    """The newest version lies whole in this slot of shared memory. The payload is its encoded manifest."""

    version: Version  # -1: the base model, which the asker needs first
    process: Id
    descriptor: Count  # of that process
    inode: Id  # what is there must be this


class OtherHost(Message, frozen=True, tag="OtherHost"):
    """The asker is on another host: it must pull."""


class ChunkRequest(Message, frozen=True, tag="ChunkRequest"):
    version: Version
    index: Count
    base_version: Version = -1  # of the delta; -1: of the full snapshot
    digest: ContentDigest = b""  # of its manifest: a relay may hold another run's version of this number


class ChunkReply(PayloadMessage, frozen=True, tag="ChunkReply"):
    """The payload is the chunk."""

    version: Version
    index: Count
    base_version: Version = -1


class ChunkLater(Message, frozen=True, tag="ChunkLater"):
    """A relay is about to have the chunk itself: ask again."""

    version: Version
    index: Count
    base_version: Version = -1


class SnapshotGone(Message, frozen=True, tag="SnapshotGone"):
    """The version asked for, in the form asked for, is no longer kept; pull `newest` instead."""

    version: Version
    newest: Version


ServerToSnapshots = ManifestRequest | ChunkRequest | MappingRequest
SnapshotsToServer = (
    ManifestReply
    | BaseModelReply
    | DeltaReply
    | NoNewer
    | ChunkReply
    | ChunkLater
    | SnapshotGone
    | MappingReply
    | OtherHost
)
