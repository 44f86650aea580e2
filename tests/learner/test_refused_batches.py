"""Batches that broke a step, on disk: written whole, read back exactly, and shown."""

import json
import math

import numpy as np
import pytest

from common.lifecycle import UserError
from deploy.__main__ import main
from learner.refused_batches import MAX_KEPT, RefusedBatch, RefusedBatches, read_refused_batch
from tests.builders_learner import a_group, a_trajectory, random_groups


def a_refused_batch(version: int = 3) -> RefusedBatch:
    groups = (a_group(a_trajectory((0, 1, 1, 0, 1), versions=[1, 2, 3], terminated=False), task_id=7),)
    return RefusedBatch(
        version=version,
        reason="the loss of micro-batch 0 is not finite",
        metrics={"loss": math.nan},
        groups=(*groups, *random_groups(0)),
    )


def test_what_is_read_is_what_was_written(tmp_path):
    batch = a_refused_batch()
    read = read_refused_batch(RefusedBatches(tmp_path / "refused").write(batch))
    assert (read.version, read.reason) == (3, batch.reason)
    assert math.isnan(read.metrics["loss"])
    for one, other in zip(read.groups, batch.groups, strict=True):
        assert (one.task_id, one.lease_id) == (other.task_id, other.lease_id)
        for mine, theirs in zip(one.trajectories, other.trajectories, strict=True):
            for name in ("token_ids", "loss_mask", "behavior_logprobs", "token_versions"):
                np.testing.assert_array_equal(getattr(mine, name), getattr(theirs, name))
            assert (mine.reward, mine.finish_reason) == (theirs.reward, theirs.finish_reason)


def test_a_run_keeps_the_newest_and_no_more(tmp_path):
    files = RefusedBatches(tmp_path)
    for version in range(MAX_KEPT + 3):
        files.write(a_refused_batch(version))
    kept = sorted(read_refused_batch(path).version for path in tmp_path.iterdir())
    assert kept == list(range(3, MAX_KEPT + 3))


def test_every_damage_is_told_from_the_file_that_was_written(tmp_path):
    path = RefusedBatches(tmp_path).write(a_refused_batch())
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 200).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"is damaged|holds no refused batch"):
            read_refused_batch(path)
        path.write_bytes(whole[:place])
        with pytest.raises(UserError, match=r"is damaged|holds no refused batch"):
            read_refused_batch(path)


def test_the_command_shows_why_and_a_line_for_each_trajectory(tmp_path, capsys):
    path = RefusedBatches(tmp_path).write(a_refused_batch())
    assert main(["batch", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "the step that would have updated version 3 was not taken: the loss of micro-batch 0 is not finite"
    )
    assert lines[-13].split() == ["7", "7", "1", "truncated", "1", "5", "3", "2", "-1.000"]


def test_the_command_gives_every_token_to_programs(tmp_path, capsys):
    path = RefusedBatches(tmp_path).write(a_refused_batch())
    assert main(["batch", "--json", str(path)]) == 0
    first, *others = map(json.loads, capsys.readouterr().out.splitlines())
    assert len(others) == 12
    assert first["loss_mask"] == [0, 1, 1, 0, 1]
    assert first["token_versions"] == [-1, 1, 2, -1, 3]


def test_the_command_names_what_it_cannot_read(tmp_path, capsys):
    assert main(["batch", str(tmp_path / "nothing")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "other").write_bytes(b"PK\x03\x04")
    assert main(["batch", str(tmp_path / "other")]) == 2
    assert "holds no refused batch" in capsys.readouterr().err
