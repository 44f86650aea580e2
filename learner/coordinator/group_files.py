"""GroupFiles: the bytes of accepted groups, in files that are only appended to, and written again from their beginning
when nothing in them is needed any more.

The journal says where each group lies. Bytes are written once, from where they were received: a database would write
them into its log and again into its file. Writing where something was written before costs the kernel a tenth of what
a file costs that grows, so files are used again instead of being deleted. Blocking; used from one thread.
"""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import xxhash

from common import disk
from common.codec import Frame

FILE_BYTES: Final = 16 << 20  # from here on the next file is begun: what one group needs keeps others from being reused
MAX_PIECES = 1024  # IOV_MAX of Linux

_FILE_NAME = re.compile(r"[0-9]{8}")


class DamagedGroupError(Exception):
    """The bytes at a place are not those that were written there."""


class Place(NamedTuple):
    """Where a group lies: its header, and directly behind it its payload."""

    file: int
    offset: int
    header_bytes: int
    payload_bytes: int
    digest: bytes  # xxh3_128 of both

    @property
    def num_bytes(self) -> int:
        return self.header_bytes + self.payload_bytes


class GroupFiles:
    """Files of one journal, in a directory of their own. Raises OSError for whatever the disk does not do.

    `needed`: the numbers of the files that hold groups. All others in the directory are deleted.
    """

    def __init__(self, directory: Path, *, needed: Collection[int]) -> None:
        self._directory = directory
        if not directory.exists():
            directory.mkdir()
            disk.sync(directory.parent)
        known = [int(path.name) for path in directory.iterdir() if _FILE_NAME.fullmatch(path.name)]
        for number in set(known) - set(needed):
            self._path(number).unlink()
        self._last = max([*known, *needed], default=0)
        self._full = set(needed)
        self._free: list[int] = []
        self._current = 0  # 0: none yet
        self._descriptor = -1
        self._offset = 0

    def __repr__(self) -> str:
        return f"<GroupFiles {len(self._full)} full, {len(self._free)} free, {self._offset} bytes in {self._current}>"

    def append(self, groups: Sequence[tuple[bytes, Frame]]) -> list[Place]:
        """Header and payload of each; on the disk when this returns."""
        if not groups:
            return []
        if not self._current or self._offset >= FILE_BYTES:
            self._begin_file()
        places = []
        offset = self._offset
        for header, payload in groups:
            places.append(Place(self._current, offset, len(header), len(payload), _digest(header, payload)))
            offset += places[-1].num_bytes
        self._write([piece for group in groups for piece in group if len(piece)])
        os.fdatasync(self._descriptor)
        self._offset = offset
        return places

    def read(self, place: Place) -> tuple[bytes, bytes]:
        """Header and payload. Raises DamagedGroupError."""
        try:
            with self._path(place.file).open("rb") as file:
                file.seek(place.offset)
                header, payload = file.read(place.header_bytes), file.read(place.payload_bytes)
        except FileNotFoundError as error:
            raise DamagedGroupError(f"{self._path(place.file)} is missing") from error
        if _digest(header, payload) != place.digest:
            raise DamagedGroupError(f"{self._path(place.file)} is damaged at {place.offset}")
        return header, payload

    def reuse_all_but(self, needed: Collection[int]) -> None:
        """Only these files hold groups now, and the disk knows that of the others nothing is needed."""
        for number in sorted(self._full - set(needed)):
            self._full.remove(number)
            self._free.append(number)

    def close(self) -> None:
        if self._current:
            os.close(self._descriptor)
            self._current = 0

    def _begin_file(self) -> None:
        if self._current:
            os.close(self._descriptor)
            self._full.add(self._current)
            self._current = 0
        if self._free:
            number = self._free.pop(0)
            self._descriptor = os.open(self._path(number), os.O_WRONLY)
            if os.fstat(self._descriptor).st_size > 2 * FILE_BYTES:  # it has held a group larger than usual
                os.ftruncate(self._descriptor, FILE_BYTES)
        else:
            self._last += 1
            number = self._last
            self._descriptor = os.open(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            disk.sync(self._directory)
        self._current, self._offset = number, 0

    def _write(self, pieces: list[Frame]) -> None:
        offset = self._offset
        for first in range(0, len(pieces), MAX_PIECES):
            left = pieces[first : first + MAX_PIECES]
            while left:
                written = os.pwritev(self._descriptor, left, offset)
                offset += written
                left = _after(left, written)

    def _path(self, number: int) -> Path:
        return self._directory / f"{number:08}"


def _after(pieces: list[Frame], num_bytes: int) -> list[Frame]:
    """What is left to be written of them once so many bytes were."""
    for index, piece in enumerate(pieces):
        if num_bytes < len(piece):
            return [memoryview(piece)[num_bytes:], *pieces[index + 1 :]]
        num_bytes -= len(piece)
    return []


def _digest(header: bytes, payload: Frame) -> bytes:
    digest = xxhash.xxh3_128(header)
    digest.update(payload)
    return digest.digest()
