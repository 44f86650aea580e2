"""Slots of memory that processes of one user on one host map: who writes one, who reads it, and never both.

A slot is an anonymous file. Its length is sealed, so that whoever maps it cannot be cut off. A writer holds the
kernel's exclusive lock on it (flock), readers hold shared ones: a slot is not written while anybody reads it, and a
reader that dies lets go of it in that moment.
"""

import fcntl
import mmap
import os
from pathlib import Path

from common.lifecycle import UserError

SLOT_NAME = "countercurrent-slot"
LENGTH_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class NotSharedError(UserError):
    """The memory of another process cannot be mapped, and why."""


def host_id() -> str:
    """The same for all processes of this machine since it was started, and for those of no other machine."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def create_slot(num_bytes: int) -> int:
    """Descriptor of a new slot, zeros."""
    descriptor = os.memfd_create(SLOT_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, num_bytes)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, LENGTH_SEALS)
    return descriptor


def lock_to_write(descriptor: int) -> bool:
    """False while another process reads the slot."""
    return _lock(descriptor, fcntl.LOCK_EX)


def lock_to_read(descriptor: int) -> bool:
    """False while the slot is being written."""
    return _lock(descriptor, fcntl.LOCK_SH)


def unlock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_UN)


def _lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_slot_of(process: int, descriptor: int, inode: int, num_bytes: int) -> int:
    """A descriptor, to read with, of another process's slot; raises NotSharedError when that is not what it is."""
    path = f"/proc/{process}/fd/{descriptor}"
    try:
        own = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NotSharedError(f"{path} cannot be opened: {error.strerror}") from error
    try:
        _check_slot(own, path, inode, num_bytes)
    except NotSharedError:
        os.close(own)
        raise
    return own


def _check_slot(descriptor: int, path: str, inode: int, num_bytes: int) -> None:
    is_memory = os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{SLOT_NAME}")
    about = os.fstat(descriptor)
    if not is_memory or about.st_ino != inode:
        raise NotSharedError(f"{path} is not the memory that was offered: is the learner in another container?")
    if about.st_uid != os.geteuid():
        raise NotSharedError(f"{path} belongs to user {about.st_uid}, this process to user {os.geteuid()}")
    if about.st_size != num_bytes:
        raise NotSharedError(f"{path} has {about.st_size} bytes, the snapshot {num_bytes}")
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & LENGTH_SEALS != LENGTH_SEALS:
        raise NotSharedError(f"the length of {path} is not sealed")


def map_slot(descriptor: int, num_bytes: int) -> mmap.mmap:
    """All of it, to read; its pages are there already."""
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
