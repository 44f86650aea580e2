"""The memory report: its arithmetic against a real rank's memory, and its refusals."""

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.lifecycle import UserError
from learner.batch_codec import part_of
from learner.engine_settings import EngineSettings
from learner.launch import Place, free_port, launched_place, ranks_here
from learner.lora_settings import LoraSettings
from learner.memory_check import Memory, check_memory, free_memory, model_shape, shapes_of
from learner.memory_plan import Models, ModelShape, most_at_once, plan_memory
from learner.networks import load_policy
from learner.reward_settings import KlSettings
from learner.training import TrainSettings
from tests.builders_learner import a_batch, random_groups, some_train_settings
from tests.models import a_model, save_model, save_tiny_model

SEVEN_BILLION = ModelShape(
    parameters=7_000_000_000, trained=7_000_000_000, layers=32, hidden=4096, inner=11008, vocabulary=32000
)
FACTOR = 1.25  # that a prediction may be off


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


def bytes_by_name(
    settings: TrainSettings, shape: ModelShape = SEVEN_BILLION, *, num_ranks: int = 1
) -> dict[str, float]:
    plan = plan_memory(settings, Models(policy=shape), num_ranks=num_ranks, ranks_here=num_ranks, has_device=True)
    return {f"{item.place}, {item.what}": item.num_bytes / 1e9 for item in plan.items}


def test_seven_billion_parameters_on_eight_ranks_take_what_the_zero_paper_says():
    """Rajbhandari et al. 2020, arXiv:1910.02054, section 5: 2 + 2 + 12 bytes a parameter, shared out by stage."""
    in_bfloat16 = {"dtype": "bfloat16", "model": "m"}
    one = bytes_by_name(TrainSettings(**in_bfloat16, zero_stage=1), num_ranks=8)
    assert one["device, policy: parameters"] == one["device, policy: gradients"] == 14.0
    assert one["device, policy: float32 masters"] + one["device, policy: Adam's moments"] == 12 * 7 / 8
    three = bytes_by_name(TrainSettings(**in_bfloat16, zero_stage=3), num_ranks=8)
    assert three["device, policy: parameters"] == three["device, policy: gradients"] == 14.0 / 8
    offloaded = TrainSettings(**in_bfloat16, zero_stage=3, engine=EngineSettings(offload="all"))
    kept = bytes_by_name(offloaded, num_ranks=8)
    assert kept["host, policy: parameters"] == 14.0 / 8
    assert kept["host, policy: Adam's moments"] == 7.0
    assert bytes_by_name(offloaded)["host, snapshots for rollout servers"] == 14.0 * 3.5


def test_the_most_of_a_rank_is_what_stays_and_the_phase_that_takes_most():
    settings = TrainSettings(model="m", dtype="bfloat16", zero_stage=3)
    plan = plan_memory(settings, Models(policy=SEVEN_BILLION), num_ranks=8, ranks_here=8, has_device=True)
    stays = 2 * 14.0 / 8 + 12 * 7 / 8 + 0.1  # parameters, gradients, masters and moments, and the bucket
    passes = 2.0 + 0.1  # a billion parameters are gathered, and a bucket of gradients is on its way
    update = 12 * 7 / 8  # a float32 copy of the gradients, and Adam's two tensors
    assert plan.device_bytes() / 1e9 == pytest.approx(stays + max(passes, update))
    file = {"zero_optimization": {"stage3_max_live_parameters": 2e9, "reduce_bucket_size": 1e9}}
    kept = bytes_by_name(replace(settings, engine=EngineSettings(deepspeed=file)), num_ranks=8)
    assert kept["device, policy: other ranks' parameters, gathered"] == 4.0
    assert kept["device, policy: bucket of gradients"] == 2.0


def test_of_layers_that_are_split_a_rank_keeps_a_part_and_shares_out_among_fewer():
    split = replace(SEVEN_BILLION, split=6_000_000_000)
    settings = TrainSettings(model="m", dtype="bfloat16", zero_stage=2, engine=EngineSettings(tensor_parallel=4))
    kept = bytes_by_name(settings, split, num_ranks=8)
    assert kept["device, policy: parameters"] == 2 * (1 + 6 / 4)
    assert kept["device, policy: Adam's moments"] == 8 * (1 + 6 / 4) / 2
    assert kept["host, snapshots for rollout servers"] == 3.5 * 14.0


def test_less_is_kept_for_adapters_and_for_activations_that_are_computed_twice():
    adapters = replace(SEVEN_BILLION, trained=10_000_000)
    assert bytes_by_name(TrainSettings(model="m"), adapters)["device, policy: Adam's moments"] == 0.08
    usual, twice = (
        next(
            gigabytes
            for name, gigabytes in bytes_by_name(TrainSettings(model="m", engine=engine)).items()
            if "activations" in name
        )
        for engine in (EngineSettings(), EngineSettings(activation_checkpointing=True))
    )
    assert twice < 0.1 * usual


def test_shapes_are_those_of_the_models_that_would_be_loaded(model: str):
    settings = some_train_settings(model, critic_model=model, advantage="gae", kl=KlSettings(reference_model=model))
    models = shapes_of(settings)
    loaded = load_policy(model, dtype="float32", temperature=1.0)
    assert models.policy.parameters == sum(each.numel() for each in loaded.parameters())
    assert models.critic is not None
    assert models.critic.parameters == models.policy.parameters  # its embeddings are tied
    assert models.reference == replace(models.policy, trained=0)
    assert models.reference.is_frozen
    layers = loaded.model.model.layers
    split = sum(
        each.numel()
        for name, each in layers.named_parameters()
        if ("_proj" in name and not name.endswith(("o_proj.bias", "down_proj.bias")))
    )
    assert shapes_of(replace(settings, engine=EngineSettings(tensor_parallel=2))).policy.split == split
    with_head = shapes_of(some_train_settings(model, advantage="gae", value_head=True)).policy
    assert (with_head.parameters, with_head.trained) == (models.policy.parameters + 65, models.policy.trained + 65)


@pytest.mark.parametrize("targets", [(), ("q_proj", "down_proj")])
def test_adapters_are_counted_as_they_would_be_made(model: str, targets: tuple[str, ...]):
    lora = LoraSettings(rank=4, alpha=8.0, target_modules=targets)
    loaded = load_policy(model, dtype="float32", temperature=1.0, lora=lora)
    made = sum(each.numel() for each in loaded.parameters() if each.requires_grad)
    assert model_shape(model, lora=lora).trained == made
    settings = some_train_settings(model, lora=lora, kl=KlSettings(coefficient=0.1, reference_model=model))
    assert shapes_of(settings).reference is None  # it is the policy without them


def test_what_cannot_fit_is_refused_before_it_is_loaded_and_says_what_would(model: str):
    place = Place(rank=0, num_ranks=2, local_rank=0, address="127.0.0.1", port=1)
    settings = some_train_settings(model)
    needed = check_memory(settings, place, free=Memory(host=1e12)).host_bytes()
    check_memory(settings, place, free=Memory(host=needed))
    with pytest.raises(UserError) as refusal:
        check_memory(settings, place, free=Memory(host=needed - 1))
    told = str(refusal.value)
    assert f"the ranks on this node need {needed / 1e9:.2f} GB of host memory" in told
    assert "--dtype bfloat16 takes " in told
    assert "--zero-stage 3 takes " in told
    assert "--check-memory false" in told
    on_device = Memory(host=1e12, device=1000.0)
    with pytest.raises(UserError, match=r"a rank needs 0\.20 GB of its device, and 0\.00 GB are free"):
        check_memory(settings, place, free=on_device)


def test_a_person_who_knows_better_and_a_mere_estimate_are_only_warned(model: str, caplog: pytest.LogCaptureFixture):
    settings = some_train_settings(model)
    certain = check_memory(settings, None, free=Memory(host=1e12)).host_bytes()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    check_memory(settings, None, free=Memory(host=certain + 1))
    assert "estimated included: --micro-batch-tokens below" in caplog.text
    check_memory(replace(settings, engine=EngineSettings(check_memory=False)), None, free=Memory(host=certain - 1))
    assert "GB of host memory" in caplog.text


def test_the_table_says_what_lives_where(model: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    check_memory(some_train_settings(model), None, free=Memory(host=8e9, device=2e9))
    for line in ("policy: float32 masters", "snapshots for rollout servers (rank 0 alone)", "of 2.000 free"):
        assert line in caplog.text


def test_ranks_of_this_node_are_counted_as_launchers_say_them():
    def place(address: str) -> Place:
        return Place(rank=0, num_ranks=16, local_rank=0, address=address, port=1)

    assert ranks_here({}, place("127.0.0.1")) == 16
    assert ranks_here({"LOCAL_WORLD_SIZE": "8"}, place("10.0.0.1")) == 8
    assert ranks_here({"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, place("10.0.0.1")) == 4
    assert ranks_here({}, place("10.0.0.1")) == 1


def test_the_memory_that_is_free_is_known():
    assert 1e7 < free_memory().host < 1e15


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "num_ranks", "dtype"), [(1, 1, "float32"), (2, 2, "float32"), (3, 1, "bfloat16"), (3, 2, "float32")]
)
def test_a_prediction_is_near_what_a_rank_really_takes(
    stage: int, num_ranks: int, dtype: Any, model: str, tmp_path: Path
):
    """Resident memory that a rank of 8M parameters gains, at its peak, by being opened and making two steps.

    What is freed is given back at once: by itself glibc keeps blocks of less than 32 MB.
    """
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192}
    larger = str(save_model(tmp_path, a_model(0, tied=True, num_attention_heads=4, num_key_value_heads=2, **shape)))
    settings = some_train_settings(larger, zero_stage=stage, dtype=dtype)
    places = [
        Place(rank=rank, num_ranks=num_ranks, local_rank=rank, address="127.0.0.1", port=port)
        for port in [free_port()]
        for rank in range(num_ranks)
    ]
    plan = check_memory(settings, places[0], free=Memory(host=1e12))
    predicted = most_at_once(item for item in plan.items if item.what.startswith("policy") and not item.is_estimate)
    command = [sys.executable, "-m", "tests.learner.test_memory", larger, model, str(stage), dtype]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    ranks = [
        subprocess.Popen(
            command,
            env=environment | (place.environment() if num_ranks > 1 else {}),
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in places
    ]
    try:
        gained = [int(rank.communicate(timeout=500)[0].split()[-1]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert all(predicted / FACTOR < each < predicted * FACTOR for each in gained), (predicted, gained)


def resident_bytes(which: str = "VmRSS") -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024


def main(model: str, tiny: str, stage: str, dtype: Any) -> None:
    from learner.deepspeed_engine import open_deepspeed_engine, open_ranks

    ranks, _ = open_ranks(launched_place(os.environ), timeout_s=100.0)
    before = 0
    for name in (tiny, model):  # the first lets everything be imported
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident_bytes()
        engine = open_deepspeed_engine(some_train_settings(name, zero_stage=int(stage), dtype=dtype), ranks)
        for version in range(2):
            batch = a_batch(random_groups(version, version=version), version=version, layout=engine.layout)
            assert engine.step(part_of(batch, ranks.rank, engine.layout)).refusal is None
    sys.stdout.write(f"{resident_bytes('VmHWM') - before}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
