"""What the learner and its snapshot server say to each other, on a local socket."""

from common.canary import Canary
from common.messages import Address, Count, Message, PayloadMessage, Seconds, Version
from common.weight_messages import WhyFull


class SnapshotWritten(PayloadMessage, frozen=True, tag="SnapshotWritten"):
    """Version `version` lies complete in slot `slot`; the payload is the encoded layout (a tuple of TensorSpec)."""

    version: Version
    slot: Count
    num_bytes: Count
    descriptor: Count  # of the slot, in the learner's process: another one than before where somebody kept the former
    canary: Canary | None = None  # of this version, if the learner computed it


class SnapshotsListening(Message, frozen=True, tag="SnapshotsListening"):
    """The snapshot server is up; `address` is as bound, with the port that was chosen."""

    address: Address


class SnapshotReady(Message, frozen=True, tag="SnapshotReady"):
    """The version is encoded, hashed and served."""

    version: Version
    full_bytes: Count
    delta_bytes: Count | None  # against the version published before it; None: there is none, or it does not pay
    encode_s: Seconds
    overtaken_versions: Count  # since the start: written, but a newer one came before their turn
    full_pulls: dict[WhyFull, Count]  # since the start: how often a server was given a full snapshot


class SlotReleased(Message, frozen=True, tag="SlotReleased"):
    """Nothing reads the slot any more."""

    slot: Count


LearnerToSnapshots = SnapshotWritten
SnapshotsToLearner = SnapshotsListening | SnapshotReady | SlotReleased
