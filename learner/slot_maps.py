"""SlotMaps: the learner's slots as its snapshot server sees them, mapped to read."""

import mmap
import os

from common.shared_slots import map_slot, open_slot_of


class SlotMaps:
    """By slot: what lies in it, and where servers on this host find it."""

    def __init__(self, learner_pid: int, descriptors: list[int], num_bytes: int) -> None:
        """descriptors: inherited from the learner, under the numbers that they have there."""
        self._learner_pid = learner_pid
        self._num_bytes = num_bytes
        self._learners = list(descriptors)
        self._own = list(descriptors)
        self._mappings: list[mmap.mmap] = [map_slot(descriptor, num_bytes) for descriptor in descriptors]

    def __repr__(self) -> str:
        return f"<SlotMaps of {len(self._own)} x {self._num_bytes} bytes>"

    def memory(self, slot: int) -> memoryview:
        return memoryview(self._mappings[slot])

    def place(self, slot: int) -> tuple[int, int, int]:
        """(process, descriptor, inode)."""
        descriptor = self._own[slot]
        return os.getpid(), descriptor, os.fstat(descriptor).st_ino

    def follow(self, slot: int, descriptor: int) -> None:
        """The learner has written the slot under this descriptor: another file, if somebody had kept the former one."""
        if self._learners[slot] == descriptor:
            return
        inode = os.stat(f"/proc/{self._learner_pid}/fd/{descriptor}").st_ino
        os.close(self._own[slot])
        self._own[slot] = open_slot_of(self._learner_pid, descriptor, inode, self._num_bytes)
        self._mappings[slot] = map_slot(self._own[slot], self._num_bytes)
        self._learners[slot] = descriptor
