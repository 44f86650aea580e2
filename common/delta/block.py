"""A block: the difference between two versions of up to MAX_BLOCK_ELEMENTS floats of one type, bit for bit.

    uint8   FORMAT_VERSION       uint32  elements              uint64  XXH3 of all other bytes
    uint8   float format         uint32  elements that change
    uint8   flags                uint32  bytes that follow
    uint8   top exponent         uint32  XXH3 of the new values, shortened: tells a wrong base

What follows is described in numpy_changes.py; or the new values as they are, where that is shorter (STORED).
"""

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from common.delta.compiled import primitives as default_primitives
from common.delta.formats import FORMATS, U32, DeltaError, ExponentOrder, FloatFormat, Primitives, Words
from common.snapshot import DType

FORMAT_VERSION = 1
MAX_BLOCK_ELEMENTS = 1 << 24
STORED, EXPONENT_ORDER = 1, 2  # flags

MIN_CHANGES_TO_ORDER = 256
MIN_BINADES = 0.5
EXPONENT_SAMPLES = 1024

_FIELDS = struct.Struct("<BBBBIIII")
_DIGEST = struct.Struct("<Q")
HEADER_BYTES = _FIELDS.size + _DIGEST.size


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """The elements of a block that change."""

    positions: U32  # [M], ascending
    values: Words  # [M] the new bit patterns

    def apply_to(self, words: Words) -> None:
        """Bring the base, or a copy of it, to the new version."""
        words[self.positions] = self.values


def encode_block(old: Words, new: Words, dtype: DType, primitives: Primitives | None = None) -> bytes:
    """What turns `old` [N] into `new` [N], bit patterns of `dtype`. At most HEADER_BYTES more than the new values."""
    primitives = primitives or default_primitives()
    form = FORMATS[dtype]
    _require_words(old, form)
    _require_words(new, form)
    if old.size != new.size:
        raise ValueError(f"the old version has {old.size} elements, the new one {new.size}")
    positions, codes = primitives.find_changes(old, new)
    check = _check_of(new[positions])
    order = choose_order(old, positions, form)
    if order is not None:
        positions, codes = primitives.into_order(old, order, positions, codes)
    payload = primitives.pack_changes(old.size, positions, codes, new.nbytes) if codes.size else b""
    flags = EXPONENT_ORDER if order is not None else 0
    if payload is None:
        flags, payload = STORED, new.tobytes()
    top = order.top if flags == EXPONENT_ORDER and order is not None else 0
    fields = _FIELDS.pack(FORMAT_VERSION, form.code, flags, top, old.size, codes.size, len(payload), check)
    return b"".join((fields, _digest_of(fields, payload), payload))


def decode_block(data: bytes | memoryview, base: Words, dtype: DType, primitives: Primitives | None = None) -> Changes:
    """The changes to be made to `base` [N].

    Raises DeltaError unless `data` is an undamaged block for exactly this base. Takes less than 100 bytes of memory
    for each element of the base, whatever the data say.
    """
    primitives = primitives or default_primitives()
    form = FORMATS[dtype]
    _require_words(base, form)
    header = _Header.read(memoryview(data), base, form)
    payload = np.frombuffer(data, np.uint8, offset=HEADER_BYTES)
    if header.flags & STORED:
        positions, values = _stored_changes(payload, base, primitives)
    else:
        positions, values = _decoded_changes(payload, base, form, header, primitives)
    if positions.size != header.changes or _check_of(values) != header.check:
        raise DeltaError("a block does not lead to the values it was made from: it is for another base")
    return Changes(positions, values)


def choose_order(old: Words, positions: U32, form: FloatFormat) -> ExponentOrder | None:
    """ExponentOrder where exponents tell which elements change, or by how much; None for the order they are in.

    They do where the changed elements are smaller than the others, by half a binade or more in the mean (read off the
    bit patterns, which grow with the logarithm), and where so many change that the sizes of the changes matter most.
    """
    if positions.size < MIN_CHANGES_TO_ORDER:
        return None
    magnitude = old.dtype.type((1 << (form.bits - 1)) - 1)
    changed = old[_some(positions)] & magnitude
    everywhere = _some(old) & magnitude
    binades = (_mean(everywhere) - _mean(changed)) / (1 << form.exponent_shift)
    if abs(binades) < MIN_BINADES * (1 - positions.size / old.size):
        return None
    return ExponentOrder(int(changed.max()) >> form.exponent_shift, form)


def _some(values: Words) -> Words:
    """About EXPONENT_SAMPLES of the values, evenly spaced."""
    return values[:: max(1, values.size // EXPONENT_SAMPLES)]


def _mean(values: Words) -> float:
    return int(values.sum(dtype=np.int64)) / values.size


def _stored_changes(payload: np.ndarray, base: Words, primitives: Primitives) -> tuple[U32, Words]:
    if payload.size != base.nbytes:
        raise DeltaError(f"a stored block has {payload.size} bytes, its base {base.nbytes}")
    new = payload.view(base.dtype) if payload.ctypes.data % base.itemsize == 0 else payload.copy().view(base.dtype)
    positions = primitives.find_changes(base, new)[0].copy()  # of its own length: it may be kept for a while
    return positions, new[positions]


def _decoded_changes(
    payload: np.ndarray, base: Words, form: FloatFormat, header: "_Header", primitives: Primitives
) -> tuple[U32, Words]:
    if header.changes == 0:
        if payload.size:
            raise DeltaError(f"a block without changes has {payload.size} bytes")
        return np.empty(0, np.uint32), base[:0]
    positions, codes = primitives.unpack_changes(payload, base.size, header.changes, form.bits)
    if header.flags & EXPONENT_ORDER:
        positions, codes = primitives.out_of_order(base, ExponentOrder(header.top, form), positions, codes)
    return positions, primitives.new_values(base, positions, codes)


def _require_words(words: Words, form: FloatFormat) -> None:
    if words.dtype != form.words or words.ndim != 1 or not words.flags.c_contiguous:
        expected = np.dtype(form.words)
        raise ValueError(f"{form.name} is coded from contiguous {expected} [N], got {words.dtype} {words.shape}")
    if words.size > MAX_BLOCK_ELEMENTS:
        raise ValueError(f"a block has at most {MAX_BLOCK_ELEMENTS} elements, got {words.size}")


def _check_of(values: Words) -> int:
    return xxhash.xxh3_64_intdigest(values.data) & 0xFFFFFFFF


def _digest_of(fields: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    state = xxhash.xxh3_64(fields)
    state.update(payload)
    return _DIGEST.pack(state.intdigest())


@dataclass(frozen=True, slots=True)
class _Header:
    flags: int
    top: int
    changes: int
    check: int

    @classmethod
    def read(cls, data: memoryview, base: Words, form: FloatFormat) -> "_Header":
        """Raises DeltaError unless this is an undamaged block that fits the base."""
        if not HEADER_BYTES <= len(data) <= HEADER_BYTES + base.nbytes:
            raise DeltaError(f"a block of {base.size} elements of {form.name} cannot have {len(data)} bytes")
        fields, payload = data[: _FIELDS.size], data[HEADER_BYTES:]
        version, code, flags, top, elements, changes, payload_bytes, check = _FIELDS.unpack(fields)
        if version != FORMAT_VERSION:
            raise DeltaError(f"a block has format {version}, this program reads {FORMAT_VERSION}")
        if payload_bytes != len(payload):
            raise DeltaError(f"a block claims {payload_bytes} bytes, {len(payload)} are there")
        if _digest_of(fields, payload) != data[_FIELDS.size : HEADER_BYTES]:
            raise DeltaError("a block does not match its digest: it was damaged on the way")
        if (code, elements) != (form.code, base.size):
            raise DeltaError(f"a block of {elements} elements of format {code}, expected {base.size} of {form.name}")
        if flags not in (0, STORED, EXPONENT_ORDER) or top > (form.exponent_mask if flags == EXPONENT_ORDER else 0):
            raise DeltaError(f"a block has flags {flags} and top exponent {top}, which mean nothing")
        if changes > elements:
            raise DeltaError(f"a block of {elements} elements claims {changes} changes")
        return cls(flags, top, changes, check)
