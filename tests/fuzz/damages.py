"""What happens to bytes on their way, by accident or on purpose."""

import random
from collections.abc import Callable, Sequence

import msgspec

HOSTILE = (
    None,
    True,
    -1,
    1 << 31,
    (1 << 64) - 1,
    -(1 << 63),
    0.5,
    float("nan"),
    float("inf"),
    -0.0,
    1e300,
    "",
    "x" * 5000,
    "\x00\n\x1b[2J",
    b"",
    b"\xff" * 300,
    [],
    [[]] * 300,
    {},
    {"a": 1},
    {1: 2},
)
MAX_REPEATS = 20
RARE = 1 / 500  # of the damages that take long: what they find does not depend on how often they are done

Damage = Callable[[bytes, random.Random], bytes]


def flip_a_byte(data: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ rng.randrange(1, 256)]) + data[position + 1 :]


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def insert(data: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(len(data) + 1)
    return data[:position] + rng.randbytes(rng.randint(1, 8)) + data[position:]


def repeat_a_part(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.randint(1, MAX_REPEATS) + data[end:]


def swap_parts(data: bytes, rng: random.Random) -> bytes:
    first, second, third = sorted(rng.randrange(len(data) + 1) for _ in range(3))
    return data[:first] + data[second:third] + data[first:second] + data[third:]


def replace_a_value(data: bytes, rng: random.Random) -> bytes:
    """Somewhere in the tree that MessagePack describes."""
    return _changed(data, rng, lambda values, place: values.__setitem__(place, rng.choice(HOSTILE)))


def leave_out_a_value(data: bytes, rng: random.Random) -> bytes:
    return _changed(data, rng, lambda values, place: values.pop(place))


def repeat_a_value(data: bytes, rng: random.Random) -> bytes:
    return _changed(data, rng, lambda values, place: values.insert(place, values[place]))


def nest(data: bytes, rng: random.Random) -> bytes:
    return b"\x91" * (100_000 if rng.random() < RARE else rng.choice((1, 100, 1_000))) + data


def swell(data: bytes, rng: random.Random) -> bytes:
    """Lengths that are only announced: lists, maps, strings and bytes of up to 4 GB."""
    announced = rng.choice((b"\xdc", b"\xdd", b"\xde", b"\xdf", b"\xdb", b"\xc6")) + rng.choice(
        (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x10\x00\x00")
    )
    position = rng.randrange(len(data) + 1)
    return data[:position] + announced + data[position:]


def damaged(data: bytes, damages: Sequence[Damage], rng: random.Random) -> bytes:
    """Once, and sometimes more than once."""
    while True:
        data = rng.choice(damages)(data, rng)
        if not data or rng.random() < 0.8:
            return data


def _changed(data: bytes, rng: random.Random, change: Callable[[list[object], int], object]) -> bytes:
    tree = values = msgspec.msgpack.decode(data)
    assert isinstance(values, list)
    while True:
        place = rng.randrange(len(values))
        if not isinstance(values[place], list) or not values[place] or rng.random() < 0.3:
            break
        values = values[place]
    change(values, place)
    return msgspec.msgpack.encode(tree)


OF_BYTES: tuple[Damage, ...] = (flip_a_byte, cut, insert, repeat_a_part, swap_parts)
OF_TREES: tuple[Damage, ...] = (replace_a_value, leave_out_a_value, repeat_a_value)
OF_MESSAGES: tuple[Damage, ...] = (*OF_BYTES, *OF_TREES, nest, swell)
