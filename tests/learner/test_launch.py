"""Whatever started the ranks, each finds its place; and a user's DeepSpeed file agrees with the settings."""

import json
from pathlib import Path

import pytest

from common.lifecycle import UserError
from learner.deepspeed_config import deepspeed_config
from learner.engine_settings import EngineSettings, read_deepspeed_file
from learner.launch import Place, first_host, launched_place, without_local_rank
from tests.builders_learner import some_train_settings

PLACE = Place(rank=3, num_ranks=4, local_rank=1, address="node1", port=1234)


def test_without_a_launcher_there_is_no_place():
    assert launched_place({"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None


def test_torchrun_and_the_deepspeed_launcher_say_it_in_the_environment():
    assert launched_place(PLACE.environment()) == PLACE
    assert without_local_rank(["--local_rank=1", "--seed", "3", "--local-rank=0"]) == ["--seed", "3"]


def test_srun_says_it_in_words_of_its_own():
    environment = {
        "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "45678",
        "SLURM_STEP_NODELIST": "gpu[007-009,012]",
    }  # fmt: skip
    assert launched_place(environment) == Place(rank=9, num_ranks=16, local_rank=1, address="gpu007", port=25678)
    chosen = launched_place({**environment, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "99"})
    assert chosen is not None
    assert (chosen.address, chosen.port) == ("10.0.0.1", 99)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a1,a2", "a1"), ("a[3,5]", "a3"), ("a[03-05]-ib,b1", "a03-ib"), ("x-1-2", "x-1-2")],
)
def test_the_first_host_of_a_list_is_where_rank_0_is(nodes: str, first: str):
    assert first_host(nodes) == first


def test_half_a_place_and_an_impossible_one_are_refused():
    with pytest.raises(UserError, match="RANK is 3, but MASTER_PORT do not say where rank 0 is"):
        launched_place({key: value for key, value in PLACE.environment().items() if key != "MASTER_PORT"})
    with pytest.raises(UserError, match="rank 4 of 4 ranks; ranks count from 0"):
        launched_place({**PLACE.environment(), "RANK": "4"})


def config_with(own: dict[str, object], **settings: object) -> dict[str, object]:
    engine = EngineSettings(deepspeed=own, deepspeed_file="mine.json")
    return deepspeed_config(some_train_settings("model", engine=engine, **settings))


def test_what_only_the_users_file_says_is_taken():
    merged = config_with(
        {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": True}, "comms_logger": {"a": 1}}
    )
    assert merged["zero_optimization"] == {
        "stage": 1, "reduce_bucket_size": 7, "allgather_bucket_size": 50_000_000, "overlap_comm": True,
    }  # fmt: skip
    assert merged["comms_logger"] == {"a": 1}
    assert merged["gradient_clipping"] == 0.5


def test_auto_is_whatever_the_settings_say():
    assert config_with({"zero_optimization": {"stage": "auto"}}, zero_stage=2)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3 there, and 1 by --zero-stage"),
        ({"gradient_clipping": 2.0}, "gradient_clipping is 2.0 there, and 0.5 by --max-grad-norm"),
        ({"optimizer": {"params": {"lr": 1}}}, "optimizer.params.lr is 1 there, and 0.01 by --learning-rate"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True there, and False by --dtype"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 4 there, and 1 by --micro-batch-tokens"),
        ({"train_batch_size": 32}, "train_batch_size cannot be set there; --groups-per-step and --group-size"),
        ({"scheduler": {}}, "scheduler cannot be set there; --lr-schedule"),
    ],
)
def test_a_conflict_names_both_values_and_where_each_comes_from(own: dict[str, object], sentence: str):
    with pytest.raises(UserError, match=r"mine\.json: ") as refused:
        config_with(own)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("content", ["{", "[1]", '"text"'])
def test_a_file_that_is_no_json_object_is_refused(content: str, tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"--deepspeed-config .*mine.json cannot be read"):
        read_deepspeed_file(path)
    path.write_text(json.dumps({"a": 1}))
    assert read_deepspeed_file(path) == {"a": 1}
    assert read_deepspeed_file(None) == {}


@pytest.mark.parametrize(
    ("offload", "stage", "complaint"), [("optimizer", 0, "needs zero_stage 1"), ("all", 2, "zero_stage 3")]
)
def test_an_offload_that_the_stage_cannot_do_is_refused(offload: str, stage: int, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        some_train_settings("model", zero_stage=stage, engine=EngineSettings(offload=offload))
