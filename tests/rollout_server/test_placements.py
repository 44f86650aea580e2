"""Where a model puts a snapshot's tensors, learnt by watching it load them; and patches made from that."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.snapshot import SnapshotManifest, TensorSpec, build_manifest
from rollout_server.copy_recorder import CopyRecorder
from rollout_server.in_place_changes import InPlaceChanges, Patch
from rollout_server.inference import LocalSnapshot
from rollout_server.local_changes import LocalChanges
from rollout_server.placements import Placement, nested_strides

Loader = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None]


def record(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], load: Loader) -> list[Placement]:
    recorder = CopyRecorder(parameters)
    with torch.no_grad(), recorder:
        load(parameters, dict(recorder.watch(tensors.items())))
    return recorder.placements()


def fused(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["qkv"].data[:6].copy_(tensors["q"])
    parameters["qkv"].narrow(0, 6, 3).copy_(tensors["k"])
    parameters["qkv"][9:] = tensors["v"]


def a_quarter_of_the_columns(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["down"].copy_(tensors["down"].narrow(1, 4, 2))


def every_other_column(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["even"].copy_(tensors["all"][:, ::2])


def a_part_of_the_rows_then_padding(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["embedding"][:5].copy_(tensors["embedding"][10:15])
    parameters["embedding"][5:].fill_(0)


def one_expert_of_each(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    for expert in range(3):
        for half, name in enumerate(("gate", "up")):
            parameters["w13"][expert, 4 * half : 4 * half + 4].copy_(tensors[name][expert].narrow(-1, 3, 3))


CASES: dict[str, tuple[Loader, dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]] = {
    "fused": (fused, {"qkv": (12, 5)}, {"q": (6, 5), "k": (3, 5), "v": (3, 5)}),
    "columns": (a_quarter_of_the_columns, {"down": (7, 2)}, {"down": (7, 8)}),
    "every other": (every_other_column, {"even": (7, 4)}, {"all": (7, 8)}),
    "padded": (a_part_of_the_rows_then_padding, {"embedding": (8, 3)}, {"embedding": (20, 3)}),
    "experts": (one_expert_of_each, {"w13": (3, 8, 3)}, {"gate": (3, 4, 9), "up": (3, 4, 9)}),
}


def snapshot_of(tensors: dict[str, torch.Tensor], path: Path, version: int) -> SnapshotManifest:
    specs, data = [], b""
    for name, tensor in tensors.items():
        specs.append(TensorSpec(name, tuple(tensor.shape), "float32", len(data)))
        data += tensor.numpy().tobytes()
    path.write_bytes(data)
    return build_manifest(memoryview(data), tuple(specs), run_id="test", version=version)


def changes_of(
    old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], path: Path, manifest: SnapshotManifest, base: int
) -> LocalChanges:
    changed = [(name, np.flatnonzero((tensor != old[name]).numpy())) for name, tensor in new.items()]
    values = {name: tensor.numpy().reshape(-1).view("<u4") for name, tensor in new.items()}
    return LocalChanges.write(path, manifest, base, ((name, where, values[name][where]) for name, where in changed))


def write(patch: Patch, parameters: dict[str, torch.Tensor]) -> None:
    """One element after the other."""
    data = patch.path.read_bytes()
    indices = np.frombuffer(data, np.int64, patch.num_items)
    values = np.frombuffer(data, np.float32, patch.num_items, 8 * patch.num_items)
    for name, start, count in patch.parts:
        flat = parameters[name].view(-1)
        for item in range(start, start + count):
            flat[int(indices[item])] = float(values[item])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1])
def test_a_patch_makes_the_parameters_what_a_load_of_the_new_snapshot_makes_them(
    tmp_path: Path, case: str, share: float
):
    load, shapes, tensor_shapes = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    old = {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes.items()}
    parameters = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    placements = record(parameters, old, load)
    changes = InPlaceChanges()
    changes.learn([(3, [_fields(placement) for placement in placements], "")])
    for version in range(1, 20):
        new = {name: tensor + (torch.rand(tensor.shape, generator=generator) < share) for name, tensor in old.items()}
        manifest = snapshot_of(new, tmp_path / "snapshot", version)
        told = changes_of(old, new, tmp_path / "changes", manifest, version - 1)
        patches = changes.prepare(
            LocalSnapshot(manifest=manifest, path=tmp_path / "snapshot", changes=told), loaded_version=version - 1
        )
        if patches is None:
            assert told.num_changed > 0.1 * sum(tensor.numel() for tensor in new.values())
            continue
        [patch] = patches
        assert patch.rank == 3
        assert patch.path.stat().st_size == 12 * patch.num_items
        expected = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        load(expected, new)
        write(patch, parameters)
        for name, tensor in expected.items():
            assert torch.equal(parameters[name], tensor)
        assert patch.num_items <= sum(count for _, _, count in told.tensors)
        old = new
    changes.close()


def _fields(placement: Placement) -> list[object]:
    """As they arrive: tuples have become lists."""
    p = placement
    return [p.tensor, p.parameter, p.start, list(p.sizes), list(p.strides), p.destination]


def scaled(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"].copy_(tensors["w"] * 2)


def added_to(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"].copy_(tensors["w"])
    parameters["w"].add_(1)


def transposed(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"].copy_(tensors["w"].t())


def half(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"][:2].copy_(tensors["w"][:2])


def twice(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"].copy_(tensors["w"])
    parameters["w"][:1].copy_(tensors["w"][1:2])


def one_row_for_all(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"].copy_(tensors["w"][0])


def into_columns(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    for column in range(4):
        parameters["w"][:, column].copy_(tensors["w"][column])


def the_value_of_one(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"].fill_(tensors["w"][0, 0].item())


def replaced(parameters: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
    parameters["w"] = tensors["w"].clone()


@pytest.mark.parametrize(
    ("load", "complaint"),
    [
        (scaled, "w is computed from the snapshot"),
        (added_to, "w is written by aten.add_"),
        (transposed, "w is computed from the snapshot"),
        (half, "not every element of w"),
        (twice, "not every element of w"),
        (one_row_for_all, "w is computed from the snapshot"),
        (into_columns, "w is written with gaps"),
        (the_value_of_one, "the value of w is read"),
        (replaced, "not every element of w"),
    ],
)
def test_what_is_not_a_plain_copy_is_said(load: Loader, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        record({"w": torch.zeros(4, 4)}, {"w": torch.randn(4, 4)}, load)


def test_of_another_type_is_not_a_plain_copy():
    with pytest.raises(ValueError, match="w is computed"):
        record({"w": torch.zeros(4)}, {"w": torch.zeros(4).bfloat16()}, lambda p, t: p["w"].copy_(t["w"]))


def test_parameters_that_share_memory_or_have_gaps_are_said():
    both = torch.zeros(2, 4)
    for parameters, complaint in [
        ({"a": both, "b": both.view(8)}, "share memory"),
        ({"a": both[0], "b": both[1]}, "b is not contiguous"),
        ({"a": both[:, :2]}, "a is not contiguous"),
        ({"a": both.t()}, "a is not contiguous"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            record(parameters, {}, lambda *_: None)


def test_an_engine_that_does_not_know_where_its_tensors_are_copies_whole_snapshots_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    changes = InPlaceChanges()
    for _ in range(2):
        changes.learn([(0, [["w", "w", 0, [4], [1], 0]], ""), (1, [], "w is computed from the snapshot, not copied")])
    assert [record.message for record in caplog.records] == [
        "every weight update copies the whole snapshot: on rank 1, w is computed from the snapshot, not copied"
    ]
    assert changes.prepare(a_small_change(tmp_path), loaded_version=4) is None


def a_small_change(tmp_path: Path) -> LocalSnapshot:
    new = {"w": torch.ones(40)}
    old = {"w": torch.cat([torch.zeros(1), torch.ones(39)])}
    manifest = snapshot_of(new, tmp_path / "snapshot", 5)
    return LocalSnapshot(
        manifest=manifest, path=tmp_path / "snapshot", changes=changes_of(old, new, tmp_path / "changes", manifest, 4)
    )


def test_changes_are_written_only_over_the_version_that_they_start_from(tmp_path: Path):
    changes = InPlaceChanges()
    changes.learn([(0, [["w", "w", 0, [40], [1], 0]], "")])
    snapshot = a_small_change(tmp_path)
    assert [changes.prepare(snapshot, loaded_version=version) is None for version in (-1, 3, 4, 5)] == [
        True, True, False, True,
    ]  # fmt: skip
    changes.close()


@pytest.mark.parametrize(
    ("sizes", "strides", "nested"),
    [
        ((3, 4), (4, 1), ((12,), (1,))),
        ((3, 2), (8, 1), ((3, 2), (8, 1))),
        ((2, 3, 4), (24, 8, 1), ((6, 4), (8, 1))),
        ((3, 1, 4), (4, 99, 1), ((12,), (1,))),
        ((1, 1), (7, 7), ((1,), (1,))),
        ((), (), ((1,), (1,))),
        ((4, 3), (1, 4), None),
        ((3, 4), (0, 1), None),
        ((3, 4), (3, 1), None),
    ],
)
def test_strides_are_nested_or_refused(sizes, strides, nested):
    assert nested_strides(sizes, strides) == nested
