"""CompiledPrimitives: kernel.c, compiled at first use and kept. Without a compiler numpy does the same, more slowly.

The name of the compiled file is a digest of its source and of the processor's features: an edit, or another machine
with the same home directory, compiles again.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.delta.formats import GROUP, NUM_CLASSES, U8, U32, DeltaError, ExponentOrder, Primitives, Words
from common.delta.primitives import NumpyPrimitives

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("kernel")
MAIN_SOURCE = "kernel.c"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
COMPILE_TIMEOUT_S = 60.0
TILE = 512  # elements that into_order and out_of_order look at together
ERROR_ROOM = -5

ERRORS = {
    -1: "a list is cut short",
    -2: "the quotients of a list are not what their number and length say",
    -3: "the padding after a part of a list is not zero",
    -4: "a value of a list is out of its range",
    -6: "places are not ascending, or not of this block",
    -7: "a position is not of its set",
    -8: "more changes are said to be larger than there are",
    -9: "something follows the end of a delta",
}


class _Array:
    """Type of an argument that is an array. The call itself keeps the array alive until it returns."""

    @classmethod
    def from_param(cls, array: np.ndarray) -> ctypes.c_void_p:
        assert array.flags.c_contiguous
        return ctypes.c_void_p(array.ctypes.data)


class CompiledPrimitives:
    """NumpyPrimitives, compiled: identical results, and DeltaError for the same inputs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        integer, size = ctypes.c_int, ctypes.c_int64
        block = [_Array, size, integer, integer, integer, integer]
        signatures = {
            "find_changes_16": [_Array, _Array, size, _Array, _Array],
            "find_changes_32": [_Array, _Array, size, _Array, _Array],
            "new_values_16": [_Array, size, _Array, _Array, size, _Array],
            "new_values_32": [_Array, size, _Array, _Array, size, _Array],
            "into_order": [*block, _Array, _Array, size, *[_Array] * 4],
            "out_of_order": [*block, _Array, _Array, size, *[_Array] * 3],
            "pack_changes": [_Array, _Array, size, size, _Array, _Array, _Array, size],
            "unpack_changes": [_Array, size, size, size, integer, *[_Array] * 4],
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = size

    def find_changes(self, old: Words, new: Words) -> tuple[U32, U32]:
        positions, codes = np.empty(old.size, np.uint32), np.empty(old.size, np.uint32)
        find = self._library.find_changes_16 if old.itemsize == 2 else self._library.find_changes_32
        found = find(old, new, old.size, positions, codes)
        return positions[:found], codes[:found]

    def new_values(self, base: Words, positions: U32, codes: U32) -> Words:
        values = np.empty(positions.size, base.dtype)
        compute = self._library.new_values_16 if base.itemsize == 2 else self._library.new_values_32
        _checked(compute(base, base.size, positions, codes, positions.size, values))
        return values

    def into_order(self, old: Words, order: ExponentOrder, positions: U32, codes: U32) -> tuple[U32, U32]:
        count = positions.size
        ranks, classes = np.empty(count, np.uint32), np.empty(count, np.uint8)
        places, ordered = np.empty(count, np.uint32), np.empty(count, np.uint32)
        into = self._library.into_order
        _checked(into(*_block(old, order), positions, codes, count, ranks, classes, places, ordered))
        return places, ordered

    def out_of_order(self, base: Words, order: ExponentOrder, places: U32, codes: U32) -> tuple[U32, U32]:
        count = places.size
        counts = np.empty((-(-base.size // TILE), NUM_CLASSES), np.uint16)
        positions, by_position = np.empty(count, np.uint32), np.empty(count, np.uint32)
        _checked(self._library.out_of_order(*_block(base, order), places, codes, count, counts, positions, by_position))
        return positions, by_position

    def pack_changes(self, universe: int, places: U32, codes: U32, room: int) -> bytes | None:
        count, out = places.size, np.empty(room, np.uint8)
        size = self._library.pack_changes(places, codes, count, universe, *_scratch(count), out, room)
        return out[: _checked(size)].tobytes() if size != ERROR_ROOM else None

    def unpack_changes(self, data: U8, universe: int, count: int, bits: int) -> tuple[U32, U32]:
        places, codes = np.empty(count, np.uint32), np.empty(count, np.uint32)
        unpack = self._library.unpack_changes
        _checked(unpack(data, data.size, universe, count, bits, *_scratch(count), places, codes))
        return places, codes


def _scratch(count: int) -> tuple[U32, U8]:
    return np.empty(3 * count, np.uint32), np.empty(-(-count // GROUP), np.uint8)


def _block(words: Words, order: ExponentOrder) -> tuple[Words, int, int, int, int, int]:
    form = order.format
    return words, words.size, form.bits, form.exponent_shift, form.exponent_mask, order.top


def _checked(result: int) -> int:
    if result < 0:
        raise DeltaError(ERRORS[result])
    return result


@functools.cache
def primitives() -> Primitives:
    """The fastest there are here. The first call may take a second or two, to compile them."""
    library = load_kernel()
    return CompiledPrimitives(library) if library is not None else NumpyPrimitives()


def load_kernel(directory: Path | None = None, flags: Sequence[str] = FLAGS) -> ctypes.CDLL | None:
    """The kernel compiled in `directory`, now or earlier; None, with a line in the log, when that is impossible."""
    try:
        directory = directory or _cache_directory()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _require_private(directory)
        path = directory / f"kernel-{_digest(flags)}.so"
        if not path.exists():
            compile_kernel(path, flags)
        _require_private(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("weight deltas are coded by numpy, which takes more time for the same bytes: %s", error)
        return None


def _cache_directory() -> Path:
    """In the virtual environment where there is one, so that nothing is left behind when it is removed."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / "kernels"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        return cache.expanduser() / "countercurrent"
    except RuntimeError as error:  # a container may run under a user id that nobody has
        raise FileNotFoundError(f"there is no folder to compile a kernel in: {error}") from error


def compile_kernel(path: Path, flags: Sequence[str]) -> None:
    """Puts the kernel at `path`. Raises OSError or SubprocessError where that is impossible."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"there is no C compiler ({', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        compiled = Path(temporary) / path.name
        command = [compiler, *flags, str(SOURCES / MAIN_SOURCE), "-o", str(compiled)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if result.returncode != 0:
            raise OSError(f"{' '.join(command)} failed: {result.stderr.strip() or result.returncode}")
        compiled.chmod(0o700)
        compiled.replace(path)  # at once: another process may be loading it


def _digest(flags: Sequence[str]) -> str:
    texts = (path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]")))
    return hashlib.sha256(b"\0".join([*texts, *map(str.encode, flags), _processor()])).hexdigest()[:16]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except FileNotFoundError:
        return platform.processor().encode()
    features = (line for line in lines if line.startswith((b"flags", b"Features")))
    return platform.machine().encode() + next(features, b"")


def _require_private(path: Path) -> None:
    """Raises PermissionError when somebody else could have put code there."""
    status = path.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{path} could have been written by others; remove it")
