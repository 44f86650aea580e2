"""Proofs: a lease names its holder under the learner's secret, so that a later coordinator of the run believes it."""

from dataclasses import dataclass
from hashlib import blake2b

from common.messages import HeldLease

PROOF_BYTES = 16


@dataclass(frozen=True, slots=True)
class LeaseProofs:
    """Makes and checks proofs. The secret lives as long as the learner does: longer than one coordinator."""

    secret: bytes

    def of(self, *, lease_id: int, task_id: int, min_version: int, holder: str) -> bytes:
        """holder: names one start of one rollout server."""
        claim = f"{lease_id} {task_id} {min_version} {holder}".encode()
        return blake2b(claim, key=self.secret, digest_size=PROOF_BYTES).digest()

    def holds(self, held: HeldLease, holder: str) -> bool:
        """Whether a coordinator of this run granted the lease to this holder."""
        return held.proof == self.of(
            lease_id=held.lease_id, task_id=held.task_id, min_version=held.min_version, holder=holder
        )
