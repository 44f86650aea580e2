import json
import stat
import subprocess
import sys

import pytest

from common.lifecycle import UserError
from learner.run_directory import open_run_directory


def test_a_second_learner_is_refused_while_the_first_one_lives(tmp_path):
    with (
        open_run_directory(tmp_path) as first,
        pytest.raises(UserError, match=rf"{tmp_path} is in use by another learner; choose another --run-dir"),
        open_run_directory(tmp_path),
    ):
        pytest.fail("two learners in one run directory")
    with open_run_directory(tmp_path) as second:
        assert second.lineage == first.lineage + 1  # the refused one has not counted


DIES_HOLDING_IT = """
import os, pathlib, sys
from learner.run_directory import open_run_directory
with open_run_directory(pathlib.Path(sys.argv[1])) as run:
    os.rmdir(run.private)
    print("held", flush=True)
    os._exit(1)
"""


def test_a_learner_that_was_killed_does_not_lock_its_successor_out(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", DIES_HOLDING_IT, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert (killed.stdout, killed.returncode) == ("held\n", 1)
    with open_run_directory(tmp_path) as run:
        assert run.lineage == 2


def test_each_start_is_another_lineage_of_the_same_run(tmp_path):
    seen = []
    for _ in range(3):
        with open_run_directory(tmp_path) as run:
            seen.append((run.run_id, run.lineage, run.lineage_id))
    run_id = seen[0][0]
    assert seen == [(run_id, lineage, f"{run_id}.{lineage}") for lineage in (1, 2, 3)]


def test_runs_have_different_names(tmp_path):
    with open_run_directory(tmp_path / "a") as one, open_run_directory(tmp_path / "b") as other:
        assert one.run_id != other.run_id


def test_a_crash_while_the_lineage_is_written_leaves_the_one_before(tmp_path):
    with open_run_directory(tmp_path) as run:
        pass
    (tmp_path / "run.tmp").write_text('{"run_')
    with open_run_directory(tmp_path) as resumed:
        assert (resumed.run_id, resumed.lineage) == (run.run_id, 2)
    assert json.loads((tmp_path / "run.json").read_text()) == {"run_id": run.run_id, "lineage": 2}


def test_only_this_user_can_enter_the_private_directory_and_it_goes_with_the_learner(tmp_path):
    with open_run_directory(tmp_path) as run:
        assert stat.S_IMODE(run.private.stat().st_mode) == 0o700
        assert len(str(run.private)) < 80  # a Unix socket's address has 108 bytes
    assert not run.private.exists()


def test_the_address_is_remembered_across_lives(tmp_path):
    with open_run_directory(tmp_path) as run:
        assert run.remembered_address() is None
        run.remember_address("tcp://127.0.0.1:5557")
    with open_run_directory(tmp_path) as resumed:
        assert resumed.remembered_address() == "tcp://127.0.0.1:5557"


def test_a_run_directory_that_cannot_be_written_is_refused_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in [("file", "File exists"), ("file/run", "Not a directory")]:
        with (
            pytest.raises(UserError, match=f"cannot write into --run-dir .*{path}: {reason}; choose another"),
            open_run_directory(tmp_path / path),
        ):
            pytest.fail("there is no such directory")
