"""Both sides cut a snapshot into the same blocks, and a full snapshot is sent where a delta does not pay."""

import numpy as np
import pytest

from common.delta import BlockPlace, Changes, blocks_of, changes_by_tensor, decode_block, encode_delta, plan
from common.delta.plan import MAX_DELTA_SHARE
from common.snapshot import ITEM_BYTES, TensorSpec
from tests.builders_delta import as_words, changed_at_random, weights


def tensors_of(*shapes_and_dtypes: tuple[tuple[int, ...], str]) -> tuple[TensorSpec, ...]:
    tensors: list[TensorSpec] = []
    offset = 0
    for index, (shape, dtype) in enumerate(shapes_and_dtypes):
        tensors.append(TensorSpec(name=f"tensor {index}", shape=shape, dtype=dtype, offset=offset))
        offset += tensors[-1].num_bytes
    return tuple(tensors)


A_MODEL = tensors_of(((10,), "float32"), ((), "float32"), ((30, 5), "bfloat16"), ((7,), "bfloat16"), ((9,), "float16"))


def snapshots_of(tensors: tuple[TensorSpec, ...], density: float) -> tuple[bytearray, bytearray]:
    rng = np.random.default_rng(0)
    old, new = bytearray(), bytearray()
    for tensor in tensors:
        words = as_words(weights(rng, tensor.num_bytes // ITEM_BYTES[tensor.dtype]), tensor.dtype)
        old += words.tobytes()
        new += changed_at_random(rng, words, density).tobytes()
    return old, new


def test_tensors_of_one_type_that_follow_each_other_share_blocks():
    assert blocks_of(A_MODEL) == (
        BlockPlace("float32", 0, 11),
        BlockPlace("bfloat16", 44, 157),
        BlockPlace("float16", 44 + 314, 9),
    )


def test_long_rows_of_elements_are_cut():
    assert blocks_of(A_MODEL, max_elements=100)[1:3] == (
        BlockPlace("bfloat16", 44, 100),
        BlockPlace("bfloat16", 244, 57),
    )


@pytest.mark.parametrize("max_elements", [1, 7, 64, 1 << 20])
def test_blocks_cover_every_byte_of_the_snapshot_once(max_elements):
    end = 0
    for block in blocks_of(A_MODEL, max_elements):
        assert block.start == end
        assert 1 <= block.num_elements <= max_elements
        end += block.num_bytes
    assert end == A_MODEL[-1].offset + A_MODEL[-1].num_bytes


@pytest.mark.parametrize("max_elements", [13, 1 << 20])
def test_decoding_every_block_in_place_brings_the_old_snapshot_to_the_new_one(max_elements):
    old, new = snapshots_of(A_MODEL, density=0.02)
    blocks = blocks_of(A_MODEL, max_elements)
    for block in blocks:
        words, target = block.words_of(old), block.words_of(new)
        Changes(np.arange(words.size, dtype=np.uint32), target).apply_to(words)
    assert old == new


def test_a_delta_of_a_model_restores_it_bit_for_bit():
    tensors = tensors_of(((300, 100), "float32"), ((100_000,), "bfloat16"), ((64,), "bfloat16"))
    old, new = snapshots_of(tensors, density=0.01)
    blocks = blocks_of(tensors, max_elements=8192)
    encoded = encode_delta(old, new, blocks)
    assert sum(map(len, encoded)) < 0.02 * len(new)
    for block, data in zip(blocks, encoded, strict=True):
        words = block.words_of(old)
        decode_block(data, words, block.dtype).apply_to(words)
    assert old == new


def test_a_full_snapshot_is_chosen_once_the_delta_exceeds_its_share():
    tensors = tensors_of(((4096,), "bfloat16"))
    old, new = snapshots_of(tensors, density=0.0)
    new[: int(len(new) * 0.4)] = np.random.default_rng(1).bytes(int(len(new) * 0.4))
    blocks = blocks_of(tensors, max_elements=256)
    assert encode_delta(old, new, blocks) is not None
    new[: int(len(new) * 0.6)] = np.random.default_rng(1).bytes(int(len(new) * 0.6))
    assert encode_delta(old, new, blocks) is None
    assert MAX_DELTA_SHARE == 0.5


def test_no_block_is_encoded_after_the_delta_has_lost():
    tensors = tensors_of(((4096,), "bfloat16"))
    old, _ = snapshots_of(tensors, density=0.0)
    new = bytearray(np.random.default_rng(1).bytes(len(old)))
    looked_at: list[int] = []

    class Watched(BlockPlace):
        def words_of(self, snapshot):
            looked_at.append(self.start)
            return super().words_of(snapshot)

    blocks = [Watched(block.dtype, block.start, block.num_elements) for block in blocks_of(tensors, 256)]
    assert encode_delta(old, new, blocks) is None
    assert max(looked_at) < 0.55 * len(old)


def encoded_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the blocks begin that are encoded from now on."""
    places: list[int] = []
    encode_block = plan.encode_block

    def watch(old, new, dtype, primitives):
        places.append(old.__array_interface__["data"][0])
        return encode_block(old, new, dtype, primitives)

    monkeypatch.setattr(plan, "encode_block", watch)
    return places


def test_of_a_large_model_that_changed_everywhere_one_block_in_eight_is_encoded_and_no_more(monkeypatch):
    tensors = tensors_of(((64 * 256,), "bfloat16"))
    old, _ = snapshots_of(tensors, density=0.0)
    new = bytearray(np.random.default_rng(1).bytes(len(old)))
    places = encoded_blocks(monkeypatch)
    assert encode_delta(old, new, blocks_of(tensors, 256)) is None
    assert len(places) == 8
    assert set(np.diff(places)) == {8 * 256 * 2}


@pytest.mark.parametrize("density", [0.01, 0.3])
def test_of_a_large_model_that_changed_less_every_block_is_encoded_once_and_handed_over_in_order(monkeypatch, density):
    tensors = tensors_of(((67 * 256 + 9,), "bfloat16"))
    old, new = snapshots_of(tensors, density)
    blocks = blocks_of(tensors, 256)
    places = encoded_blocks(monkeypatch)
    encoded = encode_delta(old, new, blocks)
    assert len(set(places)) == len(places) == len(blocks) == 68
    for block, data in zip(blocks, encoded, strict=True):
        words = block.words_of(old)
        decode_block(data, words, block.dtype).apply_to(words)
    assert old == new


@pytest.mark.parametrize("max_elements", [1, 10, 64, 1 << 20])
def test_every_change_is_handed_to_the_tensor_it_belongs_to(max_elements):
    old, new = snapshots_of(A_MODEL, density=0.3)
    flat = {tensor.name: np.frombuffer(old, f"u{ITEM_BYTES[tensor.dtype]}", -1, 0)[:0] for tensor in A_MODEL}
    for tensor in A_MODEL:
        place = BlockPlace(tensor.dtype, tensor.offset, tensor.num_bytes // ITEM_BYTES[tensor.dtype])
        flat[tensor.name] = place.words_of(old).copy()
    for block in blocks_of(A_MODEL, max_elements):
        words, target = block.words_of(old), block.words_of(new)
        positions = np.flatnonzero(words != target).astype(np.uint32)
        for changes in changes_by_tensor(block, Changes(positions, target[positions]), A_MODEL):
            assert changes.positions.size > 0
            flat[changes.tensor.name][changes.positions] = changes.values
    assert b"".join(words.tobytes() for words in flat.values()) == bytes(new)


def test_a_tensor_may_have_more_elements_than_four_bytes_count():
    (tensor,) = tensors_of(((1 << 17, 1 << 17), "bfloat16"))
    start = (1 << 33) + 100
    changes = Changes(np.array([3, 9], np.uint32), np.array([7, 8], np.uint16))
    (found,) = changes_by_tensor(BlockPlace("bfloat16", 2 * start, 10), changes, (tensor,))
    assert found.positions.tolist() == [start + 3, start + 9]


def test_words_of_a_read_only_snapshot_cannot_be_written():
    words = blocks_of(A_MODEL)[0].words_of(bytes(500))
    with pytest.raises(ValueError, match="read-only"):
        words[0] = 1
