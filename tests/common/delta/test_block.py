"""A block turns one version into the next bit for bit, in few bytes, and nothing else passes for one."""

import contextlib
import random
import tracemalloc

import numpy as np
import pytest

from common.delta import HEADER_BYTES, Changes, DeltaError, decode_block, encode_block
from common.delta import block as block_module
from common.delta.compiled import primitives
from common.delta.formats import FORMATS, Primitives, Words
from common.delta.primitives import NumpyPrimitives
from tests.builders_delta import (
    DTYPES,
    FIELDS,
    after_an_adam_step,
    as_words,
    changed_at_random,
    entropy_bits,
    sealed,
    special_patterns,
    weights,
    with_field,
)

VERSION, FORMAT, FLAGS, TOP, ELEMENTS, CHANGES, PAYLOAD_BYTES, CHECK = range(8)
DENSITIES = (0.0, 0.001, 0.01, 0.05, 0.3, 0.5, 0.7, 0.99, 1.0)
MILLION = 1 << 20


def a_generator(*seed: object) -> np.random.Generator:
    return np.random.default_rng(list(map(ord, repr(seed))))


def after(block: bytes, base: Words, dtype: str) -> Words:
    words = base.copy()
    decode_block(block, base, dtype).apply_to(words)
    return words


def two_versions(dtype: str = "bfloat16", size: int = 5000, learning_rate: float = 1e-6) -> tuple[Words, Words]:
    rng = a_generator(dtype, size)
    values = weights(rng, size)
    return as_words(values, dtype), as_words(after_an_adam_step(rng, values, learning_rate), dtype)


@pytest.mark.parametrize("size", [0, 1, 2, 127, 128, 129, 511, 513, 10_007])
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_turns_the_old_version_into_the_new_one(dtype, density, size):
    rng = a_generator(dtype, density, size)
    old = as_words(weights(rng, size), dtype)
    new = changed_at_random(rng, old, density)
    assert after(encode_block(old, new, dtype), old, dtype).tobytes() == new.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nans_infinities_subnormals_and_signed_zeros_keep_every_bit(dtype):
    patterns = special_patterns(dtype)
    old, new = np.repeat(patterns, patterns.size), np.tile(patterns, patterns.size)
    assert after(encode_block(old, new, dtype), old, dtype).tobytes() == new.tobytes()


@pytest.mark.parametrize("base", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_every_difference_of_two_bytes_can_be_coded(base):
    new = np.arange(1 << 16, dtype=np.uint16)
    old = np.full_like(new, base)
    restored = [after(encode_block(old[[i]], new[[i]], "float16"), old[[i]], "float16") for i in range(0, 1 << 16, 251)]
    assert np.array_equal(np.concatenate(restored), new[::251])
    assert np.array_equal(after(encode_block(old, new, "float16"), old, "float16"), new)


def test_the_largest_differences_of_four_bytes_can_be_coded():
    edges = np.array([0, 1, 2, 0x7FFFFFFE, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF], np.uint32)
    old, new = np.repeat(edges, 9), np.tile(edges, 9)
    scattered_old, scattered_new = np.zeros(5000, np.uint32), np.zeros(5000, np.uint32)
    scattered_old[::50][:81], scattered_new[::50][:81] = old, new  # few: they are coded, not stored
    block = encode_block(scattered_old, scattered_new, "float32")
    assert FIELDS.unpack(block[: FIELDS.size])[FLAGS] == 0
    assert np.array_equal(after(block, scattered_old, "float32"), scattered_new)


def test_the_changes_are_the_elements_that_differ_in_ascending_order():
    old, new = two_versions()
    changes = decode_block(encode_block(old, new, "bfloat16"), old, "bfloat16")
    assert np.array_equal(changes.positions, np.flatnonzero(old != new))
    assert np.array_equal(changes.values, new[old != new])


def test_an_unchanged_block_is_a_header():
    old, _ = two_versions()
    assert len(encode_block(old, old.copy(), "bfloat16")) == HEADER_BYTES == 28


def test_unrelated_versions_are_stored_as_they_are():
    rng = a_generator()
    old, new = rng.integers(0, 1 << 16, (2, 1000), np.uint16)
    block = encode_block(old, new, "bfloat16")
    assert block[HEADER_BYTES:] == new.tobytes()
    assert np.array_equal(after(block, old, "bfloat16"), new)


def test_a_stored_block_is_read_from_any_address():
    rng = a_generator()
    old, new = rng.integers(0, 1 << 32, (2, 1000), np.uint32)
    block = encode_block(old, new, "float32")
    for shift in range(4):
        moved = memoryview(bytes(shift) + block)[shift:]
        assert np.array_equal(after(moved, old, "float32"), new)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05])
def test_scattered_changes_take_at_most_a_tenth_more_than_their_entropy(density):
    rng = a_generator(density)
    old = as_words(weights(rng, MILLION), "bfloat16")
    new = changed_at_random(rng, old, density)
    changed = old != new
    bound_bits = entropy_bits(changed) * MILLION + np.log2(6) * changed.sum()
    assert len(encode_block(old, new, "bfloat16")) <= 1.05 * bound_bits / 8


@pytest.mark.parametrize(("learning_rate", "share"), [(1e-7, 0.73), (1e-6, 0.76), (1e-5, 0.81), (1e-4, 0.89)])
def test_what_the_old_exponents_tell_is_not_sent(learning_rate, share):
    old, new = two_versions(size=MILLION, learning_rate=learning_rate)
    changed = old != new
    differences = new[changed] - old[changed]
    bound_bits = entropy_bits(changed) * MILLION + entropy_bits(differences) * changed.sum()
    assert len(encode_block(old, new, "bfloat16")) <= share * bound_bits / 8


def test_where_exponents_tell_nothing_the_order_is_left_alone():
    rng = a_generator()
    old = as_words(weights(rng, MILLION), "bfloat16")
    assert FIELDS.unpack(encode_block(old, changed_at_random(rng, old, 0.01), "bfloat16")[: FIELDS.size])[FLAGS] == 0


def test_one_far_outlier_does_not_make_its_neighbours_dear():
    old = np.zeros(MILLION, np.uint16)
    new = old.copy()
    new[:2560:20] = 1  # gaps of 19, and then one of a million
    near = len(encode_block(old, new, "bfloat16"))
    new[-1] = 1
    assert len(encode_block(old, new, "bfloat16")) <= near + 12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_for_another_base_is_refused(dtype):
    old, new = two_versions(dtype, learning_rate=1e-4)
    block = encode_block(old, new, dtype)
    other = old.copy()
    other[np.flatnonzero(old != new)[3]] ^= 1
    with pytest.raises(DeltaError, match="for another base"):
        decode_block(block, other, dtype)


def test_a_stored_block_for_another_base_is_refused_when_other_elements_change():
    rng = a_generator()
    old, new = rng.integers(0, 1 << 16, (2, 1000), np.uint16)
    block = encode_block(old, new, "bfloat16")
    other = old.copy()
    other[0] = new[0]
    with pytest.raises(DeltaError, match="for another base"):
        decode_block(block, other, "bfloat16")


def test_a_block_of_another_type_or_length_is_refused():
    old, new = two_versions()
    block = encode_block(old, new, "bfloat16")
    with pytest.raises(DeltaError, match=r"5000 elements of format 2, expected 5000 of float16"):
        decode_block(block, old, "float16")
    with pytest.raises(DeltaError, match=r"5000 elements of format 2, expected 5001 of bfloat16"):
        decode_block(block, np.append(old, old[:1]), "bfloat16")


def test_a_block_with_any_flipped_bit_is_refused():
    old, new = two_versions(size=400, learning_rate=1e-5)
    block = encode_block(old, new, "bfloat16")
    for bit in range(len(block) * 8):
        damaged = bytearray(block)
        damaged[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(DeltaError):
            decode_block(damaged, old, "bfloat16")


def test_a_block_that_is_cut_or_continued_is_refused():
    old, new = two_versions(size=400, learning_rate=1e-5)
    block = encode_block(old, new, "bfloat16")
    for end in range(len(block)):
        with pytest.raises(DeltaError):
            decode_block(block[:end], old, "bfloat16")
    with pytest.raises(DeltaError, match="claims"):
        decode_block(block + b"\0", old, "bfloat16")


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (VERSION, 2, "format 2, this program reads 1"),
        (FORMAT, 3, "of format 3"),
        (FLAGS, 1, "flags 1 and top exponent"),
        (FLAGS, 0, "top exponent"),
        (ELEMENTS, 4999, "4999 elements"),
        (ELEMENTS, (1 << 32) - 1, "4294967295 elements"),
        (CHANGES, 5001, "claims 5001 changes"),
        (CHANGES, 0, "without changes has"),
        (PAYLOAD_BYTES, 1, "claims 1 bytes"),
        (CHECK, 12345, "for another base"),
    ],
)
def test_a_header_that_promises_what_is_not_there_is_refused(field, value, reason):
    old, new = two_versions(learning_rate=1e-5)
    block = encode_block(old, new, "bfloat16")
    assert FIELDS.unpack(block[: FIELDS.size])[FLAGS] == block_module.EXPONENT_ORDER
    with pytest.raises(DeltaError, match=reason):
        decode_block(with_field(block, field, value), old, "bfloat16")


def test_a_stored_block_has_as_many_bytes_as_its_base():
    rng = a_generator()
    old = as_words(weights(rng, 5000), "bfloat16")
    block = encode_block(old, changed_at_random(rng, old, 0.01), "bfloat16")
    with pytest.raises(DeltaError, match=r"a stored block has \d+ bytes, its base 10000"):
        decode_block(with_field(block, FLAGS, block_module.STORED), old, "bfloat16")


@pytest.mark.parametrize("flags", [3, 4, 128])
def test_flags_that_mean_nothing_are_refused(flags):
    rng = a_generator()
    old = as_words(weights(rng, 5000), "bfloat16")
    block = encode_block(old, changed_at_random(rng, old, 0.01), "bfloat16")
    with pytest.raises(DeltaError, match=f"flags {flags} and top exponent 0, which mean nothing"):
        decode_block(with_field(block, FLAGS, flags), old, "bfloat16")


def test_a_top_exponent_outside_of_the_format_is_refused():
    old, new = two_versions("float16", learning_rate=1e-5)
    block = encode_block(old, new, "float16")
    with pytest.raises(DeltaError, match="top exponent 32"):
        decode_block(with_field(block, TOP, 32), old, "float16")


def test_a_block_larger_than_its_values_is_refused_before_it_is_looked_at():
    old, _ = two_versions(size=100)
    with pytest.raises(DeltaError, match="cannot have 229 bytes"):
        decode_block(bytes(HEADER_BYTES + 201), old, "bfloat16")


def peak_bytes_of_decoding(data: bytes, base: Words, implementation: Primitives) -> int:
    tracemalloc.start()
    with contextlib.suppress(DeltaError):
        decode_block(data, base, "float32", implementation)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak_bytes


@pytest.mark.parametrize("implementation", [NumpyPrimitives(), primitives()], ids=["numpy", "fastest"])
def test_no_block_takes_more_memory_than_the_base_allows(implementation):
    size, rng = 50_000, random.Random(0)
    old = as_words(weights(a_generator(), size), "float32")
    blocks = [
        encode_block(old, changed_at_random(a_generator(), old, density, largest_change), "float32")
        for density in (0.4, 0.6, 1.0)
        for largest_change in (3, 1000, 1 << 24)
    ]
    for payload in (b"\xff" * 4 * size, b"\0" * 4 * size, rng.randbytes(4 * size), b"\0\xff" * 2 * size):
        for changes in (0, 1, size // 2, size // 2 + 1, size):
            for flags, top in ((0, 0), (block_module.EXPONENT_ORDER, 120), (block_module.STORED, 0)):
                fields = FIELDS.pack(1, 1, flags, top, size, changes, len(payload), 0)
                blocks.append(sealed(fields, payload))
    assert max(peak_bytes_of_decoding(block, old, implementation) for block in blocks) <= 100 * size


def test_decoding_does_not_touch_the_base():
    old, new = two_versions()
    base = old.copy()
    decode_block(encode_block(old, new, "bfloat16"), base, "bfloat16")
    assert np.array_equal(base, old)


def test_changes_are_applied_in_place():
    words = np.array([1, 2, 3], np.uint16)
    Changes(np.array([0, 2], np.uint32), np.array([7, 9], np.uint16)).apply_to(words)
    assert words.tolist() == [7, 2, 9]


@pytest.mark.parametrize(
    "words",
    [
        np.zeros(4, np.uint32),
        np.zeros(4, np.int16),
        np.zeros(8, np.uint16)[::2],
        np.zeros((2, 2), np.uint16),
    ],
    ids=["of another width", "signed", "not contiguous", "of two dimensions"],
)
def test_what_is_no_row_of_bit_patterns_is_a_mistake_of_the_caller(words):
    good = np.zeros(4, np.uint16)
    for arguments in ((words, good), (good, words)):
        with pytest.raises(ValueError, match="bfloat16 is coded from contiguous uint16"):
            encode_block(*arguments, "bfloat16")
    with pytest.raises(ValueError, match="bfloat16 is coded from contiguous uint16"):
        decode_block(encode_block(good, good, "bfloat16"), words, "bfloat16")


def test_versions_of_different_lengths_are_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="the old version has 3 elements, the new one 4"):
        encode_block(np.zeros(3, np.uint16), np.zeros(4, np.uint16), "bfloat16")


def test_a_block_has_a_largest_size(monkeypatch):
    monkeypatch.setattr(block_module, "MAX_BLOCK_ELEMENTS", 3)
    with pytest.raises(ValueError, match="at most 3 elements, got 4"):
        encode_block(np.zeros(4, np.uint16), np.zeros(4, np.uint16), "bfloat16")


def test_the_header_has_the_documented_layout():
    old, new = two_versions()
    block = encode_block(old, new, "bfloat16")
    version, form, _, _, elements, changes, payload_bytes, _ = FIELDS.unpack(block[: FIELDS.size])
    assert (version, form, elements) == (1, FORMATS["bfloat16"].code, 5000)
    assert changes == np.count_nonzero(old != new)
    assert payload_bytes == len(block) - HEADER_BYTES
    assert sealed(block[: FIELDS.size], block[HEADER_BYTES:]) == block
