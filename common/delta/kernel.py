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
from pathlib import Path

import numpy as np

from common.delta.formats import GROUP, NUM_CLASSES, U8, U32, DeltaError, ExponentOrder, Primitives, Words
from common.delta.primitives import NumpyPrimitives

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernel.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
COMPILE_TIMEOUT_S = 60.0
TILE = 512
MAX_LIST_BYTES_PER_VALUE = 11  # 5 + 21 + 30 + 32 bits, each part padded: more than any value takes
ROOM_BYTES = 64

ERRORS = {
    -1: "a list is cut short",
    -2: "the quotients of a list are not what their number and length say",
    -3: "the padding after a part of a list is not zero",
    -4: "a value of a list is out of its range",
    -5: "a list does not fit",
    -6: "positions are not ascending, or not of this block",
}


class CompiledPrimitives:
    """NumpyPrimitives, compiled: identical results, and DeltaError for the same inputs."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        block = [pointer, size, integer, integer, integer, integer]
        signatures = {
            "find_changes_16": [pointer, pointer, size, pointer, pointer],
            "find_changes_32": [pointer, pointer, size, pointer, pointer],
            "into_order": [*block, pointer, pointer, size, *[pointer] * 4],
            "out_of_order": [*block, pointer, pointer, size, *[pointer] * 7],
            "pack_list": [pointer, size, pointer, pointer, size],
            "unpack_list": [pointer, size, size, pointer, pointer],
        }
        for name, arguments in signatures.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = size

    def find_changes(self, old: Words, new: Words) -> tuple[U32, U32]:
        positions, codes = np.empty(old.size, np.uint32), np.empty(old.size, np.uint32)
        find = self._library.find_changes_16 if old.itemsize == 2 else self._library.find_changes_32
        found = find(_address(old), _address(new), old.size, _address(positions), _address(codes))
        return positions[:found], codes[:found]

    def into_order(self, old: Words, order: ExponentOrder, positions: U32, codes: U32) -> tuple[U32, U32]:
        changes = positions.size
        ranks, classes = np.empty(changes, np.uint32), np.empty(changes, np.uint8)
        places, ordered = np.empty(changes, np.uint32), np.empty(changes, np.uint32)
        arrays = map(_address, (ranks, classes, places, ordered))
        block = _block(old, order)
        _checked(self._library.into_order(*block, _address(positions), _address(codes), changes, *arrays))
        return places, ordered

    def out_of_order(self, old: Words, order: ExponentOrder, places: U32, codes: U32) -> tuple[U32, U32]:
        changes, tiles, marks = places.size, -(-old.size // TILE), -(-old.size // 64)
        scratch = (
            np.empty(tiles * TILE, np.uint8),
            np.empty(tiles * NUM_CLASSES, np.uint16),
            np.empty(marks, np.uint64),
            np.empty(marks, np.uint32),
            np.empty(changes, np.uint32),
        )
        positions, by_position = np.empty(changes, np.uint32), np.empty(changes, np.uint32)
        arrays = map(_address, (*scratch, positions, by_position))
        block = _block(old, order)
        _checked(self._library.out_of_order(*block, _address(places), _address(codes), changes, *arrays))
        return positions, by_position

    def pack_list(self, values: U32) -> bytes:
        parameters = np.empty(-(-values.size // GROUP), np.uint8)
        out = np.empty(values.size * MAX_LIST_BYTES_PER_VALUE + ROOM_BYTES, np.uint8)
        pack = self._library.pack_list
        size = _checked(pack(_address(values), values.size, _address(parameters), _address(out), out.size))
        return out[:size].tobytes()

    def unpack_list(self, data: U8, count: int) -> tuple[U32, int]:
        parameters = np.empty(-(-count // GROUP), np.uint8)
        values = np.empty(count, np.uint32)
        unpack = self._library.unpack_list
        used = _checked(unpack(_address(data), data.size, count, _address(parameters), _address(values)))
        return values, used


def _address(array: np.ndarray) -> int:
    assert array.flags.c_contiguous
    return int(array.ctypes.data)


def _block(words: Words, order: ExponentOrder) -> tuple[int, ...]:
    form = order.format
    return (_address(words), words.size, form.bits, form.exponent_shift, form.exponent_mask, order.top)


def _checked(result: int) -> int:
    if result < 0:
        raise DeltaError(ERRORS[result])
    return result


@functools.cache
def primitives() -> Primitives:
    """The fastest there are here. The first call may take a second or two, to compile them."""
    library = load_kernel(_cache_directory())
    return CompiledPrimitives(library) if library is not None else NumpyPrimitives()


def load_kernel(directory: Path, source: Path = SOURCE) -> ctypes.CDLL | None:
    """The kernel compiled in `directory`, now or earlier; None, with a line in the log, when that is impossible."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = directory / f"kernel-{_digest(source)}.so"
        if not path.exists():
            _compile(source, path)
        _require_private(directory)
        _require_private(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("weight deltas are coded by numpy, which takes more time for the same bytes: %s", error)
        return None


def _cache_directory() -> Path:
    """In the virtual environment where there is one, so that nothing is left behind when it is removed."""
    if sys.prefix != sys.base_prefix:
        return Path(sys.prefix) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "countercurrent"


def _compile(source: Path, path: Path) -> None:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise FileNotFoundError(f"there is no C compiler ({', '.join(COMPILERS)})")
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        compiled = Path(temporary) / path.name
        command = [compiler, *FLAGS, str(source), "-o", str(compiled)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        if result.returncode != 0:
            raise OSError(f"{' '.join(command)} failed: {result.stderr.strip() or result.returncode}")
        compiled.chmod(0o700)
        compiled.replace(path)  # at once: another process may be loading it


def _digest(source: Path) -> str:
    return hashlib.sha256(b"\0".join([source.read_bytes(), *map(str.encode, FLAGS), _processor()])).hexdigest()[:16]


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
