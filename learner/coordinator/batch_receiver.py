"""BatchReceiver: the parts of a batch, as batch_sender.py sends them, become groups again."""

from common.codec import Frame, ProtocolError, unpack_groups
from common.trajectory import Group
from learner.coordinator.messages import Batch


class BatchReceiver:
    """One batch at a time, over one coordinator after the other."""

    def __init__(self) -> None:
        self._version = -1
        self._num_received = 0  # parts
        self._groups: list[Group] = []

    def add(self, part: Batch, payload: Frame) -> bool:
        """Whether the batch is complete now. Raises ProtocolError for a part that is not the next one."""
        if part.part == 0:  # also when the coordinator was killed in the middle of a batch: another one sends it anew
            self._version, self._num_received, self._groups = part.version, 0, []
        if (part.version, part.part) != (self._version, self._num_received):
            raise ProtocolError(
                f"expected part {self._num_received} of the batch of version {self._version}, got part {part.part} of "
                f"that of version {part.version}"
            )
        self._num_received += 1
        self._groups += unpack_groups(part.groups, payload)
        return self._num_received == part.num_parts

    def take(self) -> tuple[Group, ...]:
        """The groups of a complete batch; they are not kept."""
        groups, self._groups = tuple(self._groups), []
        return groups
