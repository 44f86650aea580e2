"""Manifests that say they are adapters, wrong in ways that their digest does not show: the publisher itself errs."""

import os
import random
from functools import cache
from pathlib import Path

import msgspec

from common.snapshot import (
    MAX_SNAPSHOT_BYTES,
    NO_DIGEST,
    AdapterSpec,
    SnapshotError,
    SnapshotManifest,
    TensorSpec,
    build_manifest,
    decode_manifest,
    digest_of,
    digests_of_chunks,
    encode_manifest,
)
from rollout_server.inference import LocalSnapshot
from rollout_server.model_tensors import PEFT_PREFIX, check_adapter
from rollout_server.snapshot_transport import WeightTarget
from tests.fuzz.damages import OF_TREES, damaged

RANK, WIDTH, CHUNK_BYTES = 4, 16, 512
SHAPES = {f"layers.{n}.{layer}.weight": (WIDTH, WIDTH) for n in range(2) for layer in ("q_proj", "v_proj")}
MODEL = SHAPES | {"norm.weight": (WIDTH,), "lm_head.weight": (WIDTH, WIDTH)}
TARGETS = ("q_proj", "v_proj")
BASE_MODEL = bytes(range(16))
NAMES = (
    "q_proj", "", ".", "..lora_A.weight", PEFT_PREFIX, f"{PEFT_PREFIX}.lora_A.weight", "lora_A.weight",
    f"{PEFT_PREFIX}norm.lora_A.weight", f"{PEFT_PREFIX}lm_head.lora_B.weight", "lm_head.lora_A.weight",
    f"{PEFT_PREFIX}layers.0.q_proj.lora_A.weight.lora_A.weight", "\x00", "../../x.lora_B.weight",
)  # fmt: skip
NUMBERS = (0, 1, 2, RANK - 1, RANK + 1, WIDTH, 1 << 16, (1 << 16) + 1, 1 << 40, -1)


def laid_out(tensors: list[tuple[str, tuple[int, ...], str]]) -> tuple[TensorSpec, ...]:
    specs: list[TensorSpec] = []
    for name, shape, dtype in tensors:
        end = specs[-1].offset + specs[-1].num_bytes if specs else 0
        specs.append(TensorSpec(name=name, shape=shape, dtype=dtype, offset=max(-1, min(end, MAX_SNAPSHOT_BYTES))))  # type: ignore[arg-type]
    return tuple(specs)


@cache
def an_adapter() -> tuple[SnapshotManifest, Path]:
    """And where its bytes lie."""
    kinds = [("lora_A", (RANK, WIDTH)), ("lora_B", (WIDTH, RANK))]
    layers = [name.removesuffix(".weight") for name in SHAPES]
    tensors = laid_out(
        [(f"{PEFT_PREFIX}{layer}.{half}.weight", shape, "float32") for layer in layers for half, shape in kinds]
    )
    data = bytes(tensors[-1].offset + tensors[-1].num_bytes)
    spec = AdapterSpec(base_model=BASE_MODEL, rank=RANK, alpha=8.0, target_modules=TARGETS)
    manifest = build_manifest(memoryview(data), tensors, run_id="run", version=3, chunk_bytes=CHUNK_BYTES, adapter=spec)
    file = os.memfd_create("adapter")
    os.write(file, data)
    return manifest, Path(f"/proc/self/fd/{file}")


class Adapters:
    """Whatever is accepted by the manifest's checks, the receiver's and the engine's is an adapter of the model."""

    name = "adapters"

    def __init__(self) -> None:
        self._manifest, self._path = an_adapter()
        self._target = WeightTarget(run_id="run", loaded_version=2, published_version=3, base_model=BASE_MODEL)

    def refuses(self, rng: random.Random) -> bool:
        try:
            manifest = decode_manifest(self._wrong(rng))
            self._target.check(manifest)
            if manifest.adapter is None:
                return True  # the engine is given the whole policy, and looks for all of the model's names
            check_adapter(LocalSnapshot(manifest=manifest, path=self._path), MODEL, "float32")
        except SnapshotError:
            return True
        self._check_promises(manifest)
        return False

    def _wrong(self, rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return signed(self._restructured(rng))
        data = damaged(encode_manifest(self._manifest), OF_TREES, rng)
        try:
            return signed(msgspec.msgpack.decode(data, type=SnapshotManifest))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return data

    def _restructured(self, rng: random.Random) -> SnapshotManifest:
        """One of its parts is another, and the rest is made to fit."""
        spec, tensors = self._manifest.adapter, [(t.name, t.shape, t.dtype) for t in self._manifest.tensors]
        place = rng.randrange(len(tensors))
        name, shape, dtype = tensors[place]
        match rng.randrange(8):
            case 0:
                tensors[place] = (rng.choice(NAMES), shape, dtype)
            case 1:
                tensors[place] = (name, tuple(rng.choice(NUMBERS) for _ in range(rng.randrange(4))), dtype)
            case 2:
                tensors[place] = (name, shape, rng.choice(("bfloat16", "float16")))
            case 3:
                del tensors[place]
            case 4:
                rng.shuffle(tensors)
            case 5:
                spec = msgspec.structs.replace(spec, rank=rng.choice(NUMBERS))
            case 6:
                spec = msgspec.structs.replace(spec, target_modules=tuple(rng.choices(NAMES, k=rng.randrange(3))))
            case 7:
                spec = msgspec.structs.replace(spec, alpha=rng.choice((0.0, -1.0, 1e-300, 1e9, 1e10, float("nan"))))
        layout = laid_out(tensors)
        num_bytes = max(-1, min(sum(tensor.num_bytes for tensor in layout), MAX_SNAPSHOT_BYTES))
        data = memoryview(bytes(max(0, min(num_bytes, 1 << 16))))
        return msgspec.structs.replace(
            self._manifest,
            tensors=layout,
            num_bytes=num_bytes,
            chunk_digests=digests_of_chunks(data, CHUNK_BYTES),
            adapter=spec,
        )

    def _check_promises(self, manifest: SnapshotManifest) -> None:
        spec = manifest.adapter
        assert spec is not None
        assert spec.base_model == BASE_MODEL
        assert 0 < spec.alpha <= 1e9
        for tensor in manifest.tensors:
            layer, _, half = tensor.name.removeprefix(PEFT_PREFIX).removesuffix(".weight").rpartition(".")
            assert layer.rpartition(".")[2] in spec.target_modules
            outputs, inputs = MODEL[f"{layer}.weight"]
            assert tensor.shape == ((spec.rank, inputs) if half == "lora_A" else (outputs, spec.rank))
            assert tensor.offset + tensor.num_bytes <= self._path.stat().st_size


def signed(manifest: SnapshotManifest) -> bytes:
    blank = msgspec.structs.replace(manifest, digest=NO_DIGEST)
    return encode_manifest(msgspec.structs.replace(manifest, digest=digest_of(encode_manifest(blank))))
