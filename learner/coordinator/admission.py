"""Admission of groups' bytes: past this line nobody doubts them again."""

from collections.abc import Sequence
from dataclasses import dataclass

from common.codec import Frame, ProtocolError, check_group, check_vocabulary, read_columns
from common.messages import GroupHeader
from common.together import split_payload
from learner.coordinator.replay_queue import FinishedGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a group of this run must be like."""

    group_size: int
    vocab_size: int
    max_model_len: int

    def judge(
        self, headers: Sequence[GroupHeader], payload: Frame, *, newest_version: int
    ) -> list[FinishedGroup | ProtocolError]:
        """Of groups that came together, each as the queue keeps it, or why it is not plausible.

        All are looked at at once; one by one only where that finds something. Raises codec.ProtocolError when headers
        and payload do not fit: then nothing of them can be told apart.
        """
        payloads = split_payload(headers, payload)
        if len(headers) == 1:
            return [self._judge_one(headers[0], payload, newest_version)]
        try:
            self._check(headers, payload, newest_version)
        except ProtocolError:
            return [self._judge_one(*group, newest_version) for group in zip(headers, payloads, strict=True)]
        return [_finished(*group, newest_version) for group in zip(headers, payloads, strict=True)]

    def _judge_one(self, header: GroupHeader, payload: Frame, newest_version: int) -> FinishedGroup | ProtocolError:
        try:
            self._check((header,), payload, newest_version)
        except ProtocolError as error:
            return error
        return _finished(header, payload, newest_version)

    def _check(self, headers: Sequence[GroupHeader], payload: Frame, newest_version: int) -> None:
        """Raises ProtocolError when anything about any of them is wrong."""
        columns = read_columns([trajectory for header in headers for trajectory in header.trajectories], payload)
        for header in headers:
            check_group(
                header,
                max_model_len=self.max_model_len,
                group_size=self.group_size,
                newest_version=newest_version,
            )
        check_vocabulary(columns, self.vocab_size)


def _finished(header: GroupHeader, payload: Frame, newest_version: int) -> FinishedGroup:
    versions = [version for trajectory in header.trajectories for version, _ in trajectory.version_runs]
    return FinishedGroup(
        header=header,
        payload=payload,
        oldest_version=min(versions),
        newest_version=max(versions),
        accepted_version=newest_version,
    )
