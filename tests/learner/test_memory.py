"""The memory report: its arithmetic against a real rank's memory, and its refusals."""

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from common.lifecycle import UserError
from learner.engine_settings import EngineSettings
from learner.launch import Place, ranks_here
from learner.lora_settings import LoraSettings
from learner.memory_check import Memory, check_memory, free_memory, model_shape, shapes_of
from learner.memory_plan import Models, ModelShape, plan_memory
from learner.networks import load_policy
from learner.reward_settings import KlSettings
from learner.training import TrainSettings
from tests.builders_learner import a_batch, random_groups, some_train_settings
from tests.models import a_model, save_model, save_tiny_model

SEVEN_BILLION = ModelShape(
    parameters=7_000_000_000, trained=7_000_000_000, layers=32, hidden=4096, inner=11008, vocabulary=32000
)
FACTOR = 1.35  # that a prediction may be off


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
    with pytest.raises(UserError, match=r"a rank needs 0\.00 GB of its device, and 0\.00 GB are free"):
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
@pytest.mark.parametrize("stage", ["1"])
def test_a_prediction_is_near_what_a_rank_really_takes(stage: str, model: str, tmp_path: Path):
    """Resident memory that a rank of 8M parameters in float32 gains, at its peak, by being opened and making a step."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 8192}
    larger = str(save_model(tmp_path, a_model(0, tied=True, num_attention_heads=4, num_key_value_heads=2, **shape)))
    plan = check_memory(some_train_settings(larger, zero_stage=int(stage)), None, free=Memory(host=1e12))
    predicted = sum(item.num_bytes for item in plan.items if item.what.startswith("policy") and not item.is_estimate)
    command = [sys.executable, "-m", "tests.learner.test_memory", larger, model, stage]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert ended.returncode == 0, ended.stderr
    gained = int(ended.stdout.split()[-1])
    assert predicted / FACTOR < gained < predicted * FACTOR, (predicted, gained)


def resident_bytes(which: str = "VmRSS") -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{which}:")]
    return int(line.split()[1]) * 1024


def main(model: str, tiny: str, stage: str) -> None:
    from learner.deepspeed_engine import open_deepspeed_engine

    before = 0
    for name in (tiny, model):  # the first lets everything be imported
        before = resident_bytes()
        engine = open_deepspeed_engine(some_train_settings(name, zero_stage=int(stage)))
        assert engine.step(a_batch(random_groups(0))).refusal is None
    sys.stdout.write(f"{resident_bytes('VmHWM') - before}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
