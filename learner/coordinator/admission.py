"""Admission of a group's bytes: past this line nobody doubts them again."""

from common.codec import Frame, check_group, read_columns
from common.messages import GroupHeader
from learner.coordinator.replay_queue import FinishedGroup


def admit(
    header: GroupHeader, payload: Frame, *, group_size: int, vocab_size: int, max_model_len: int, newest_version: int
) -> FinishedGroup:
    """The group as the queue keeps it; raises codec.ProtocolError unless every value of it is plausible."""
    check_group(
        header,
        read_columns(header, payload),
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        group_size=group_size,
        newest_version=newest_version,
    )
    versions = [version for trajectory in header.trajectories for version, _ in trajectory.version_runs]
    return FinishedGroup(
        header=header,
        payload=payload,
        oldest_version=min(versions),
        newest_version=max(versions),
        accepted_version=newest_version,
    )
