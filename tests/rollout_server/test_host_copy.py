"""HostCopy: bytes that are written into it are what others read by its path, whatever was there before."""

import os
from contextlib import closing

import numpy as np
import pytest

from rollout_server.host_copy import HostCopy

CHUNK_BYTES = 5_000  # no whole number of pages


def write(copy: HostCopy, data: bytes) -> None:
    """Its chunks from the last to the first, as they may arrive."""
    copy.begin(len(data))
    for start in reversed(range(0, len(data), CHUNK_BYTES)):
        copy.write(start, memoryview(data)[start : start + CHUNK_BYTES])


def test_what_is_written_is_read_in_memory_and_by_path_when_it_is_new_when_it_is_not_and_when_its_size_changes():
    rng = np.random.default_rng(0)
    with closing(HostCopy()) as copy:
        for num_bytes in (30_001, 30_001, 61_234, 12_345, 12_345):
            data = rng.bytes(num_bytes)
            write(copy, data)
            assert copy.path.read_bytes() == data
            assert copy.memory == data


def test_a_kernel_that_writes_less_than_it_was_given_is_given_the_rest(monkeypatch: pytest.MonkeyPatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:999], offset))
    data = np.random.default_rng(0).bytes(12_345)
    with closing(HostCopy()) as copy:
        write(copy, data)
        assert copy.path.read_bytes() == data
