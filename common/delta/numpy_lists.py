"""Lists: Rice codes of unsigned integers.

Layout, bits in little-endian order, every part padded to a byte with zeros:

    uint32      bytes of the quotients
    parameters  5 bits for every group of 128 values: k, or ALL_ZERO
    quotients   value >> k in unary: that many zeros (at most 20), and a one
    remainders  the k lowest bits of every value
    escapes     uint32: value >> k of the values whose quotient is written as 20

Groups of zeros have neither quotients nor remainders.
"""

import numpy as np
import numpy.typing as npt

from common.delta.formats import (
    ALL_ZERO,
    GROUP,
    LIST_HEADER_BYTES,
    MAX_PARAMETER,
    MAX_QUOTIENT,
    PARAMETER_BITS,
    U8,
    U32,
    DeltaError,
)

I64 = npt.NDArray[np.int64]
SEARCH_BELOW, SEARCH_ABOVE = 1, 3  # parameters tried around the mean bit length of a group


def pack_list(values: U32) -> bytes:
    """The values in the layout above."""
    parameters = _choose_parameters(values)
    packed_parameters = _pack_bits(parameters, np.full(parameters.size, PARAMETER_BITS))
    written = np.repeat(parameters != ALL_ZERO, GROUP)[: values.size]
    k = np.repeat(parameters, GROUP)[: values.size][written]
    quotients = values[written].astype(np.int64) >> k
    capped = np.minimum(quotients, MAX_QUOTIENT)
    ends = np.cumsum(capped + 1)
    unary = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
    unary[ends - 1] = 1
    packed_unary = np.packbits(unary, bitorder="little")
    remainders = _pack_bits(values[written].astype(np.int64) & ((1 << k) - 1), k)
    escapes = quotients[capped == MAX_QUOTIENT].astype("<u4")
    header = np.array([packed_unary.size], "<u4")
    return b"".join(part.tobytes() for part in (header, packed_parameters, packed_unary, remainders, escapes))


def unpack_list(data: U8, count: int) -> tuple[U32, int]:
    """(values [count], bytes used). Raises DeltaError unless `data` begins with such a list."""
    groups = -(-count // GROUP)
    start = LIST_HEADER_BYTES + _bytes_of(groups * PARAMETER_BITS)
    if data.size < start:
        raise DeltaError(f"a list of {count} values is cut short")
    num_quotient_bytes = int(data[:LIST_HEADER_BYTES].view("<u4")[0])
    width = np.full(groups, PARAMETER_BITS)
    parameters = _unpack_bits(data[LIST_HEADER_BYTES:start], width, "parameters")
    written = np.repeat(parameters != ALL_ZERO, GROUP)[:count]
    k = np.repeat(parameters, GROUP)[:count][written]
    end = start + num_quotient_bytes
    if end > data.size or num_quotient_bytes > _bytes_of(k.size * (MAX_QUOTIENT + 1)):
        raise DeltaError(f"a list of {count} values claims {num_quotient_bytes} bytes of quotients")
    quotients = _unpack_unary(data[start:end], k.size)
    start, end = end, end + _bytes_of(int(k.sum()))
    if end > data.size:
        raise DeltaError(f"a list of {count} values is cut short")
    remainders = _unpack_bits(data[start:end], k, "remainders")
    end += _read_escapes(data[end:], quotients, k)
    values = np.zeros(count, np.uint32)
    values[written] = (quotients << k) | remainders
    return values, end


def _bytes_of(bits: int) -> int:
    return -(-bits // 8)


def _choose_parameters(values: U32) -> I64:
    """[ceil(N / GROUP)] the parameter that makes each group shortest, of those near its mean bit length."""
    groups = -(-values.size // GROUP)
    padded = np.zeros(groups * GROUP, np.int64)
    padded[: values.size] = values
    grouped = padded.reshape(groups, GROUP)
    counts = np.full(groups, GROUP)
    counts[-1:] = values.size - (groups - 1) * GROUP
    mean_length = np.frexp(grouped)[1].sum(axis=1) // counts
    best = np.zeros(groups, np.int64)
    best_cost = np.full(groups, np.iinfo(np.int64).max)
    for offset in range(-SEARCH_BELOW, SEARCH_ABOVE + 1):
        k = np.clip(mean_length + offset, 0, MAX_PARAMETER)
        quotients = grouped >> k[:, None]
        cost = np.minimum(quotients, MAX_QUOTIENT).sum(axis=1) + k * counts
        cost += 32 * (quotients >= MAX_QUOTIENT).sum(axis=1)
        best = np.where(cost < best_cost, k, best)
        best_cost = np.minimum(cost, best_cost)
    return np.where(grouped.any(axis=1), best, ALL_ZERO)


def _pack_bits(values: I64, widths: I64) -> U8:
    """The `width` lowest bits of every value, one after the other."""
    ends = np.cumsum(widths)
    total = int(ends[-1]) if ends.size else 0
    place = np.arange(total) - np.repeat(ends - widths, widths)
    return np.packbits((np.repeat(values, widths) >> place).astype(np.uint8) & 1, bitorder="little")


def _unpack_bits(data: U8, widths: I64, what: str) -> I64:
    """The inverse of _pack_bits; widths are at most 31. `data` must have exactly as many bytes as they take."""
    ends = np.cumsum(widths)
    total = int(ends[-1]) if ends.size else 0
    if total % 8 and data[-1] >> (total % 8):
        raise DeltaError(f"the padding after the {what} of a list is not zero")
    padded = np.zeros(data.size + 8, np.uint8)
    padded[: data.size] = data
    windows: npt.NDArray[np.uint64] = np.ndarray(data.size + 1, "<u8", padded, strides=(1,))  # 8 bytes from each on
    starts = ends - widths
    values: I64 = (windows[starts >> 3] >> (starts & 7).astype(np.uint64)).astype(np.int64)
    return values & ((1 << widths) - 1)


def _unpack_unary(data: U8, count: int) -> I64:
    ends = np.flatnonzero(np.unpackbits(data, bitorder="little"))
    if ends.size != count:
        raise DeltaError(f"{ends.size} quotients in a list where {count} are expected")
    if data.size != (_bytes_of(int(ends[-1]) + 1) if count else 0):
        raise DeltaError("the quotients of a list end before their bytes do")
    quotients = np.diff(ends, prepend=-1) - 1
    if count and quotients.max() > MAX_QUOTIENT:
        raise DeltaError(f"a quotient of {quotients.max()} in a list, at most {MAX_QUOTIENT} are written in unary")
    return quotients


def _read_escapes(data: U8, quotients: I64, k: I64) -> int:
    """Puts the quotients that were too long into their places; returns the bytes they take."""
    escaped = np.flatnonzero(quotients == MAX_QUOTIENT)
    num_bytes = escaped.size * 4
    if num_bytes > data.size:
        raise DeltaError(f"{escaped.size} escaped values of a list are cut short")
    quotients[escaped] = data[:num_bytes].copy().view("<u4")
    if np.any(quotients[escaped] < MAX_QUOTIENT) or np.any(quotients > 0xFFFFFFFF >> k):
        raise DeltaError("a value of a list is out of its range")
    return num_bytes
