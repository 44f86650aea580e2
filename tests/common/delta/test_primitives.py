"""The compiled kernel and numpy give the same results for the same inputs, along every way through the kernel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.delta import DeltaError, encode_block
from common.delta.formats import FORMATS, ExponentOrder
from common.delta.numpy_lists import pack_list, unpack_list
from common.delta.primitives import NumpyPrimitives
from tests.builders_delta import (
    DTYPES,
    KERNEL_FLAGS,
    a_kernel,
    after_an_adam_step,
    as_words,
    changed_at_random,
    special_patterns,
    weights,
)
from tests.fuzz_delta import HOSTILE_LISTS, fuzz, refuse_hostile_lists

NUMPY = NumpyPrimitives()
SIZES = st.one_of(st.integers(0, 300), st.sampled_from([511, 512, 513, 1024, 4097]))
BLOCK = 1 << 20


@pytest.fixture(scope="session", params=KERNEL_FLAGS)
def kernel(request, tmp_path_factory):
    return a_kernel(tmp_path_factory.mktemp("kernels", numbered=True), request.param)


def same(left, right) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    size=SIZES,
    density=st.sampled_from([0.0, 0.001, 0.01, 0.2, 0.5, 0.6, 0.95, 1.0]),
    largest_change=st.sampled_from([1, 3, 40, 30_000]),
    seed=st.integers(0, 1 << 32),
)
def test_they_write_the_same_bytes_and_read_the_same_changes(kernel, dtype, size, density, largest_change, seed):
    rng = np.random.default_rng(seed)
    old = as_words(weights(rng, size), dtype)
    new = changed_at_random(rng, old, density, largest_change)
    changes = NUMPY.find_changes(old, new)
    assert same(kernel.find_changes(old, new), changes)
    assert same([kernel.new_values(old, *changes)], [NUMPY.new_values(old, *changes)])
    assert np.array_equal(kernel.new_values(old, *changes), new[old != new])
    order = ExponentOrder(int(rng.integers(FORMATS[dtype].exponent_mask + 1)), FORMATS[dtype])
    placed = NUMPY.into_order(old, order, *changes)
    assert same(kernel.into_order(old, order, *changes), placed)
    assert same(kernel.out_of_order(old, order, *placed), changes)
    assert same(NUMPY.out_of_order(old, order, *placed), changes)
    packed = NUMPY.pack_changes(size, *placed, 100 + 20 * size)
    assert kernel.pack_changes(size, *placed, 100 + 20 * size) == packed
    data = np.frombuffer(packed, np.uint8)
    for reader in (kernel, NUMPY):
        assert same(reader.unpack_changes(data, size, changes[0].size, FORMATS[dtype].bits), placed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_agree_on_strange_patterns(kernel, dtype):
    patterns = special_patterns(dtype)
    old, new = np.repeat(patterns, patterns.size), np.tile(patterns, patterns.size)
    for first, second in ((old, new), (np.tile(old, 40), np.tile(new, 40))):
        assert encode_block(first, second, dtype, kernel) == encode_block(first, second, dtype, NUMPY)


@pytest.mark.parametrize("learning_rate", [1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_they_agree_on_whole_blocks(kernel, dtype, learning_rate):
    rng = np.random.default_rng(0)
    values = weights(rng, BLOCK // 4 + 77)
    old, new = (as_words(v, dtype) for v in (values, after_an_adam_step(rng, values, learning_rate)))
    assert encode_block(old, new, dtype, kernel) == encode_block(old, new, dtype, NUMPY)


def test_they_agree_on_what_fits(kernel):
    rng = np.random.default_rng(0)
    old = as_words(weights(rng, 3000), "bfloat16")
    changes = NUMPY.find_changes(old, changed_at_random(rng, old, 0.1))
    size = len(NUMPY.pack_changes(3000, *changes, 1 << 20))
    for room in (0, 1, 3, 4, size // 2, size - 1, size):
        assert kernel.pack_changes(3000, *changes, room) == NUMPY.pack_changes(3000, *changes, room)
    assert kernel.pack_changes(3000, *changes, size - 1) is None


def test_they_agree_on_damaged_deltas(kernel):
    assert fuzz(kernel, versions=250, seed=3)["refused"] > 1000


def parts_of_some_changes() -> tuple[bytes, bytes, bytes]:
    """(places, signs, the rest) of three changes among 20, by +1, -1 and +3."""
    places, codes = np.array([2, 3, 11], np.uint32), np.array([1, 0, 5], np.uint32)
    packed = NUMPY.pack_changes(20, places, codes, 1000)
    end = len(pack_list(np.array([2, 0, 7], np.uint32)))
    return packed[:end], packed[end : end + 1], packed[end + 1 :]


@pytest.mark.parametrize("reader", ["kernel", "numpy"])
def test_parts_of_changes_that_contradict_each_other_are_refused(kernel, reader):
    unpack = (kernel if reader == "kernel" else NUMPY).unpack_changes
    places, signs, rest = parts_of_some_changes()
    assert signs == b"\x05"

    def read(*parts: bytes, universe: int = 20) -> list[int]:
        return unpack(np.frombuffer(b"".join(parts), np.uint8), universe, 3, 16)[1].tolist()

    assert read(places, signs, rest) == [1, 0, 5]
    assert read(places, signs, rest, universe=12) == [1, 0, 5]
    one_member, nothing = pack_list(np.array([2], np.uint32)), bytes(4)
    assert read(places, signs, b"\1\0\0\0", one_member, nothing) == [1, 0, 3]
    largest = pack_list(np.array([(1 << 15) - 3], np.uint32))
    assert read(places, b"\1", b"\1\0\0\0", one_member, b"\1\0\0\0", largest) == [1, 0, (1 << 16) - 2]
    too_large = pack_list(np.array([(1 << 15) - 2], np.uint32))
    wraps = pack_list(np.array([(1 << 32) - 1], np.uint32))
    for parts in (
        (places, b"\x0d", rest),  # a sign too many
        (places, signs, rest[:-1]),
        (places, signs, rest + b"\0"),
        (places, signs, b"\4" + rest[1:]),  # four of three changes
        (places, signs, b"\1\0\0\0", pack_list(np.array([3], np.uint32)), nothing),  # number 3 of three
        (places, b"\5", b"\1\0\0\0", one_member, b"\1\0\0\0", largest),  # a difference of 2^15
        (places, b"\1", b"\1\0\0\0", one_member, b"\1\0\0\0", too_large),
        (places, b"\1", b"\1\0\0\0", one_member, b"\1\0\0\0", wraps),
        (places, signs),
        (places,),
    ):
        with pytest.raises(DeltaError):
            read(*parts)
    with pytest.raises(DeltaError):
        read(places, signs, rest, universe=11)


def test_the_kernel_refuses_places_that_are_not_ascending_or_not_of_the_block(kernel):
    old = as_words(weights(np.random.default_rng(0), 2000), "bfloat16")
    order = ExponentOrder(122, FORMATS["bfloat16"])
    codes = np.zeros(2, np.uint32)
    for places in ([5, 5], [1500, 3], [3, 2000], [3, (1 << 32) - 1]):
        with pytest.raises(DeltaError, match="not ascending, or not of this block"):
            kernel.out_of_order(old, order, np.array(places, np.uint32), codes)
    for positions in ([1500, 3], [3, 2000], [3, (1 << 32) - 1]):
        with pytest.raises(DeltaError, match="not ascending, or not of this block"):
            kernel.into_order(old, order, np.array(positions, np.uint32), codes)
    with pytest.raises(DeltaError, match="not of its set"):
        kernel.new_values(old, np.array([0, 2000], np.uint32), codes)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000])
def test_a_list_is_at_most_a_hundredth_longer_than_with_the_best_parameters_of_all(size):
    rng = np.random.default_rng(size)
    shapes = (rng.geometric(0.01, size) - 1, rng.integers(0, 1 << 32, size), rng.geometric(0.9, size) - 1)
    for values in (*shapes, (rng.pareto(0.5, size) * 10).clip(0, (1 << 32) - 1)):
        groups = [values.astype(np.int64)[i : i + 128] for i in range(0, size, 128)]
        best_bits = sum(min(bits_of(group, k) for k in range(31)) if group.any() else 0 for group in groups)
        overhead_bytes = 4 + len(groups) + 3
        assert len(pack_list(values.astype(np.uint32))) <= 1.01 * best_bits / 8 + overhead_bytes


def bits_of(group: np.ndarray, k: int) -> int:
    return sum(min(int(value) >> k, 20) + 1 + k + 32 * ((int(value) >> k) >= 20) for value in group)


@pytest.mark.parametrize(("data", "reason"), HOSTILE_LISTS)
def test_a_list_that_is_not_what_its_parts_say_is_refused(data, reason):
    with pytest.raises(DeltaError, match=reason):
        unpack_list(np.frombuffer(data, np.uint8), 1)


def test_every_implementation_refuses_such_lists(kernel):
    refuse_hostile_lists(kernel)
    refuse_hostile_lists(NUMPY)


def test_a_list_ends_where_it_says():
    values = np.array([0, 5, 1 << 31, (1 << 32) - 1], np.uint32)
    packed = pack_list(values)
    read, used = unpack_list(np.frombuffer(packed + b"next", np.uint8), 4)
    assert np.array_equal(read, values)
    assert used == len(packed)
