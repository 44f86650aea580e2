"""How much memory a process has taken, and a bound on how much more it may take."""

import ctypes
import os
from pathlib import Path

_STATM = Path("/proc/self/statm")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def private_bytes() -> int:
    """Resident memory that no file backs: what the process itself has filled."""
    _, resident, shared, *_ = _STATM.read_text().split()
    return (int(resident) - int(shared)) * _PAGE_BYTES


class MemoryBound:
    """What the process may hold from now on: what it holds already, and `growth_bytes`."""

    def __init__(self, growth_bytes: int) -> None:
        self.limit_bytes = private_bytes() + growth_bytes

    def __repr__(self) -> str:
        return f"<MemoryBound {private_bytes() >> 20} of {self.limit_bytes >> 20} MiB>"

    def excess_bytes(self) -> int:
        """0 while the bound holds."""
        return max(0, private_bytes() - self.limit_bytes)


def give_back_memory() -> None:
    """Hand to the system what was freed: libc keeps small pieces otherwise."""
    ctypes.CDLL(None).malloc_trim(0)
