"""Damaged frames of every kind: what comes out is a message that keeps its promises, or a ProtocolError."""

import random
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from common.codec import Decoder, ProtocolError, encode, pack_group, unpack_groups
from common.messages import Batch, GroupFinished
from tests.builders_codec import UNIONS, a_group, examples_of

FRAMES_PER_UNION = 10_000
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
    "",
    "x" * 5000,
    "\x00\n\x1b[2J",
    b"",
    b"\xff" * 300,
    [],
    [[]] * 70_000,
    {},
    {"a": 1},
    {1: 2},
)


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
    return data[:end] + data[start:end] * rng.randint(1, 50) + data[end:]


def replace_a_value(data: bytes, rng: random.Random) -> bytes:
    tree = msgspec.msgpack.decode(data)
    node = tree
    while True:
        position = rng.randrange(len(node))
        if not isinstance(node[position], list) or not node[position] or rng.random() < 0.3:
            break
        node = node[position]
    node[position] = rng.choice(HOSTILE)
    return msgspec.msgpack.encode(tree)


def nest(data: bytes, rng: random.Random) -> bytes:
    return b"\x91" * rng.choice((1, 100, 100_000)) + data


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip_a_byte,
    cut,
    insert,
    repeat_a_part,
    replace_a_value,
    nest,
)


@pytest.mark.parametrize("name", UNIONS)
def test_a_damaged_header_is_refused_or_still_a_valid_message(name: str):
    examples = examples_of(UNIONS[name])
    decoder = Decoder(UNIONS[name], max_payload_bytes=1 << 20)
    rng = random.Random(name)
    kinds = tuple(type(example) for example in examples)
    refused = 0
    for number in range(FRAMES_PER_UNION):
        header, _ = encode(examples[number % len(examples)])
        damaged = rng.choice(DAMAGES)(bytes(header), rng)
        try:
            message, _ = decoder.decode([damaged, b""])
        except ProtocolError:
            refused += 1
        else:
            assert isinstance(message, kinds)
            assert decoder.decode(encode(message)) == (message, b"")
    assert refused > FRAMES_PER_UNION / 2


def test_a_damaged_group_is_refused_or_keeps_every_promise():
    rng = random.Random(0)
    decoder = Decoder(GroupFinished | Batch, max_payload_bytes=1 << 20)
    header, payload = pack_group(a_group())
    refused = 0
    for _ in range(FRAMES_PER_UNION):
        frames = [bytes(encode(GroupFinished(group=header))[0]), payload]
        which = rng.randrange(2)
        frames[which] = rng.choice(DAMAGES[:4])(frames[which], rng)
        try:
            message, body = decoder.decode(frames)
            assert isinstance(message, GroupFinished)
            [group] = unpack_groups([message.group], body)
        except ProtocolError:
            refused += 1
            continue
        for trajectory in group.trajectories:
            assert trajectory.token_ids.min() >= 0
            assert np.isfinite(trajectory.behavior_logprobs).all()
            assert trajectory.behavior_logprobs.max() <= 0
            assert not trajectory.behavior_logprobs[~trajectory.loss_mask].any()
            assert ((trajectory.token_versions >= 0) == trajectory.loss_mask).all()
            assert trajectory.num_sampled_tokens > 0
    assert refused > FRAMES_PER_UNION / 2
