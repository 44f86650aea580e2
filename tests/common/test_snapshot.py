import msgspec
import pytest

from common.canary import Canary
from common.snapshot import (
    NO_VERSION,
    AdapterSpec,
    SnapshotError,
    SnapshotManifest,
    TensorSpec,
    build_manifest,
    decode_manifest,
    encode_manifest,
    verify_chunk,
)

DATA = bytes(range(256)) * 3


def a_manifest(**changes: object) -> SnapshotManifest:
    tensors = (
        TensorSpec(name="embedding", shape=(16, 8), dtype="float32", offset=0),
        TensorSpec(name="norm", shape=(128,), dtype="bfloat16", offset=512),
    )
    manifest = build_manifest(memoryview(DATA), tensors, run_id="run", version=7, chunk_bytes=100)
    return msgspec.structs.replace(manifest, **changes)


def test_a_manifest_survives_the_wire():
    assert decode_manifest(encode_manifest(a_manifest())) == a_manifest()


def test_every_chunk_of_the_snapshot_verifies():
    manifest = a_manifest()
    assert manifest.num_chunks == 8
    for index in range(manifest.num_chunks):
        start, end = manifest.chunk_range(index)
        verify_chunk(manifest, index, DATA[start:end])


ADAPTER = AdapterSpec(base_model=bytes(range(16)), rank=4, alpha=8.0, target_modules=("q_proj",))
CANARY = Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=0.1)


def test_an_adapter_says_so_in_its_manifest_and_nobody_can_change_what_it_is():
    manifest = build_manifest(memoryview(DATA), a_manifest().tensors, run_id="run", version=7, adapter=ADAPTER)
    assert decode_manifest(encode_manifest(manifest)).adapter == ADAPTER
    other = msgspec.structs.replace(ADAPTER, alpha=16.0)
    with pytest.raises(SnapshotError, match="does not match its digest"):
        decode_manifest(encode_manifest(msgspec.structs.replace(manifest, adapter=other)))


@pytest.mark.parametrize("changes", [{"adapter": ADAPTER}, {"canary": CANARY}])
def test_a_base_model_is_of_no_version_and_is_neither_adapter_nor_policy(changes: dict[str, object]):
    def a_base_model(run_id: str = "run", **changes: object) -> SnapshotManifest:
        tensors = a_manifest().tensors
        return build_manifest(memoryview(DATA), tensors, run_id=run_id, version=NO_VERSION, **changes)  # type: ignore[arg-type]

    assert decode_manifest(encode_manifest(a_base_model())).is_base_model
    with pytest.raises(SnapshotError, match="a base model is no adapter"):
        decode_manifest(encode_manifest(a_base_model(**changes)))
    assert a_base_model("run.2").content_digest == a_base_model().content_digest != a_manifest().content_digest


@pytest.mark.parametrize("bit", range(0, 800, 37))
def test_a_flipped_bit_in_a_chunk_is_refused(bit: int):
    chunk = bytearray(DATA[:100])
    chunk[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises(SnapshotError, match="chunk 0 of snapshot 7: the digest does not match"):
        verify_chunk(a_manifest(), 0, bytes(chunk))


def test_a_chunk_of_the_wrong_size_is_refused():
    with pytest.raises(SnapshotError, match="expected 100 bytes, got 99"):
        verify_chunk(a_manifest(), 0, DATA[:99])


def test_a_chunk_of_another_place_is_refused():
    with pytest.raises(SnapshotError, match="digest"):
        verify_chunk(a_manifest(), 1, DATA[:100])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_bytes": 770}, "tensors fill 768 bytes"),
        ({"chunk_bytes": 90}, "chunk digests"),
        ({"canary": Canary(token_ids=(1, 2), logprobs=(-1.0,), tolerance=0.1)}, "does not match its digest"),
        (
            {"canary": Canary(token_ids=(1, 2), logprobs=(-1.0, -2.0), tolerance=0.1)},
            "not one log-probability",
        ),
        ({"digest": bytes(16)}, "does not match its digest"),
        ({"tensors": (TensorSpec(name="embedding", shape=(192,), dtype="float32", offset=4),)}, "starts at 4"),
        ({"tensors": (TensorSpec(name="a", shape=(1,), dtype="float32", offset=0),) * 2}, "named twice"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes: dict[str, object], complaint: str):
    with pytest.raises(SnapshotError, match=complaint):
        decode_manifest(encode_manifest(a_manifest(**changes)))


@pytest.mark.parametrize("data", [b"", b"\x93", b"\xc1" * 40, b"\xff" * 100, encode_manifest(a_manifest())[:-1]])
def test_garbage_is_not_a_manifest(data: bytes):
    with pytest.raises(SnapshotError, match="cannot be decoded"):
        decode_manifest(data)


def test_every_flipped_bit_of_a_manifest_is_refused():
    encoded = encode_manifest(a_manifest())
    for position in range(len(encoded) * 8):
        flipped = bytearray(encoded)
        flipped[position // 8] ^= 1 << (position % 8)
        with pytest.raises(SnapshotError):
            decode_manifest(bytes(flipped))
