"""Versions of a model's weights as files, each with what changed in it since the one before, for bench_apply."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from transformers import Qwen2ForCausalLM

from common.snapshot import SnapshotManifest, build_manifest
from rollout_server.inference import LocalSnapshot
from rollout_server.local_changes import LocalChanges
from rollout_server.model_tensors import checkpoint_dtype
from rollout_server.vllm_start import VllmSettings
from tests.models import a_model, save_model, snapshot_bytes

SIZES = {  # hidden, intermediate, layers, vocabulary
    "5M": (256, 768, 6, 2048),
    "30M": (512, 1536, 8, 8192),
    "100M": (768, 2304, 12, 16384),
}
WORDS = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2")}
ONE_UNIT = {"float32": 1 << 16, "bfloat16": 1}  # in the last place of a bfloat16
MAX_MODEL_LEN = 512


def a_sized_model(size: str, dtype: str) -> Qwen2ForCausalLM:
    hidden, intermediate, layers, vocabulary = SIZES[size]
    return a_model(
        0, tied=True, dtype=getattr(torch, dtype), vocab_size=vocabulary, hidden_size=hidden,
        intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
    )  # fmt: skip


def engine_settings(directory: Path, model: Qwen2ForCausalLM) -> VllmSettings:
    saved = str(save_model(directory / "model", model))
    return VllmSettings(model=saved, dtype=checkpoint_dtype(saved), max_model_len=MAX_MODEL_LEN, max_num_seqs=64)


class Versions:
    """Sets of weights 0 to num_sets - 1, each like the one before but for a share of its elements.

    What changes does so by one unit in the last place of a bfloat16, up or down, as a step of training would have it.
    """

    def __init__(self, directory: Path, model: Qwen2ForCausalLM, share: float, *, num_sets: int = 2) -> None:
        directory.mkdir()
        self._directory = directory
        self._model = model
        dtype = str(model.dtype).removeprefix("torch.")
        data, self._tensors = snapshot_bytes(model)
        self.num_bytes = len(data)
        self.num_sets = num_sets
        self._sets = [np.frombuffer(data, WORDS[dtype])]
        generator = np.random.default_rng(round(share * 1e6))
        for _ in range(num_sets - 1):
            words = self._sets[-1].copy()
            is_zero = words << 1 == 0  # one unit below that is no number
            places = np.flatnonzero((generator.random(words.size, np.float32) < share) & ~is_zero)
            words[places] += (generator.choice((-1, 1), places.size) * ONE_UNIT[dtype]).astype(words.dtype)
            self._sets.append(words)
        self._manifests: list[SnapshotManifest] = []
        for number, words in enumerate(self._sets):
            self._path(number).write_bytes(words.data)
            data = words.tobytes()
            self._manifests.append(build_manifest(memoryview(data), self._tensors, run_id="bench", version=number))
        self._steps = {
            (a, b): self._changes(a, b) for a in range(num_sets) for b in (a - 1, a + 1) if -1 < b < num_sets
        }

    def whole(self, number: int, version: int) -> LocalSnapshot:
        """Set `number` as that version."""
        manifest = msgspec.structs.replace(self._manifests[number], version=version)
        return LocalSnapshot(manifest=manifest, path=self._path(number))

    def step(self, old: int, new: int, base_version: int) -> LocalSnapshot:
        """From set `old`, which is loaded as base_version, to its neighbour `new` as the version after."""
        changes = replace(self._steps[old, new], base_version=base_version)
        return replace(self.whole(new, base_version + 1), changes=changes)

    def model(self, number: int) -> Qwen2ForCausalLM:
        """Set `number` as transformers computes with it."""
        model = copy.deepcopy(self._model)
        words = torch.from_numpy(self._sets[number].view(f"<i{self._sets[number].itemsize}").copy())
        for tensor, parameter in zip(self._tensors, model.parameters(), strict=True):
            start = tensor.offset // words.itemsize
            values = words[start : start + parameter.numel()].view(parameter.dtype)
            parameter.data.copy_(values.view(parameter.shape))
        return model

    def _path(self, number: int) -> Path:
        return self._directory / f"set-{number}"

    def _changes(self, old: int, new: int) -> LocalChanges:
        is_changed = self._sets[old] != self._sets[new]

        def changes() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
            for tensor in self._tensors:
                start = tensor.offset // self._sets[old].itemsize
                stop = start + tensor.num_bytes // self._sets[old].itemsize
                places = np.flatnonzero(is_changed[start:stop])
                yield tensor.name, places, self._sets[new][start:stop][places]

        return LocalChanges.write(self._directory / f"changes-{old}-{new}", self._manifests[new], 0, changes())
