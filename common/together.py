"""Together: several leases, groups or acknowledgements in one message.

Nothing waits for a message to be full: whoever sends takes what has come while the message before was made and sent.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

from common.codec import Frame, check_size
from common.messages import MAX_TOGETHER, MAX_TOGETHER_BYTES, GroupHeader

T = TypeVar("T")

_COLUMN_BYTES = (4, 4, 1)  # of one token, see codec.py


def in_messages(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Consecutive items, for a message each time: at most MAX_TOGETHER of MAX_TOGETHER_BYTES, or a larger one alone."""
    some: list[T] = []
    total = 0
    for item in items:
        size = num_bytes(item)
        if some and (len(some) == MAX_TOGETHER or total + size > MAX_TOGETHER_BYTES):
            yield some
            some, total = [], 0
        some.append(item)
        total += size
    if some:
        yield some


def join_payloads(headers: Sequence[GroupHeader], payloads: Sequence[Frame]) -> Frame:
    """The payload of groups that are sent together, from the payload of each."""
    if len(payloads) == 1:
        return payloads[0]
    pieces: list[list[memoryview]] = [[], [], []]  # of each column
    for header, payload in zip(headers, payloads, strict=True):
        count, view, start = _num_tokens(header), memoryview(payload), 0
        for column, width in zip(pieces, _COLUMN_BYTES, strict=True):
            column.append(view[start : start + width * count])
            start += width * count
    return b"".join(piece for column in pieces for piece in column)


def split_payload(headers: Sequence[GroupHeader], payload: Frame) -> list[Frame]:
    """The payload of each of the groups that were sent together: the inverse of join_payloads().

    Those of several groups are copies: one that is kept does not keep the others in memory.
    Raises ProtocolError unless headers and payload fit.
    """
    bounds = list(accumulate(map(_num_tokens, headers), initial=0))
    count = bounds[-1]
    check_size(payload, count)
    if len(headers) == 1:
        return [payload]
    view = memoryview(payload)
    ids, logprobs, mask = view[: 4 * count], view[4 * count : 8 * count], view[8 * count :]
    return [
        b"".join((ids[4 * start : 4 * end], logprobs[4 * start : 4 * end], mask[start:end]))
        for start, end in pairwise(bounds)
    ]


def _num_tokens(header: GroupHeader) -> int:
    return sum([trajectory.num_tokens for trajectory in header.trajectories])
