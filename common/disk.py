"""What is on the disk, and not only on its way there."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """A file's bytes, or a directory's names, survive a loss of power after this. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
