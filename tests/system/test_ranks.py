"""Several learner ranks as real processes: killed, stopped, and started by other launchers."""

import os
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.system.processes import COMMANDS, LEARNER, Command, Stage
from tests.system.test_interruptions import SLOW, current_checkpoint

pytestmark = pytest.mark.timeout(300)

DOWN_S = 10.0  # within which the ranks that are left end when one died


def a_run(model: str, *, steps: int, ranks: int = 2) -> tuple[str, ...]:
    settings = ("--checkpoint-every-steps", "4", "--server-timeout-s", "2", "--zero-stage", "3", "--ranks", str(ranks))
    return (*LEARNER, *SLOW, *settings, "--total-steps", str(steps), "--model", model)


def environment_of(pid: int) -> dict[str, str]:
    pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def ranks_of(stage: Stage) -> dict[int, int]:
    """Process ids of the learners that train, by rank."""
    learners = [pid for pid, words in stage.processes().items() if " -m learner " in words]
    return {int(environment_of(pid)["RANK"]): pid for pid in learners}


async def stops_and_is_started_anew(stage: Stage, learner: Command, rank: int) -> None:
    before = ranks_of(stage)
    assert sorted(before) == [0, 1]
    killed_s = time.monotonic()
    os.kill(before[rank], signal.SIGKILL)
    told = await learner.says(rf"rank {rank} was killed by SIGKILL.*; starting all 2 ranks anew from version (\d+)")
    assert time.monotonic() - killed_s < DOWN_S
    assert not set(before.values()) & set(stage.processes())
    await learner.says(f"resuming at version {told[1]}")


@pytest.mark.slow
async def test_a_killed_rank_takes_the_others_down_and_all_go_on_from_the_last_checkpoint(
    stage: Stage, demo_model: str
):
    learner = await stage.start(*a_run(demo_model, steps=14))
    server = await stage.start(*await learner.join_command())
    await stage.reaches(learner, 5)
    await stops_and_is_started_anew(stage, learner, rank=1)
    resumed_at = current_checkpoint(stage)
    await stage.reaches(learner, resumed_at + 2)
    learner.send_signal(signal.SIGTERM)  # all of them end in order, and leave a checkpoint of the last step
    assert await learner.exit_code() == 128 + signal.SIGTERM
    stopped_at = stage.steps()[-1]
    assert current_checkpoint(stage) == stopped_at
    assert stage.steps(2) == list(range(resumed_at + 1, stopped_at + 1))
    assert await stage.has_no("-m learner")
    alone = await stage.start(*a_run(demo_model, steps=stopped_at + 8, ranks=1))  # what two ranks wrote
    await alone.says(f"resuming at version {stopped_at}")
    for command in (alone, server):
        assert await command.exit_code() == 0, repr(command)
    assert await stage.has_no()


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ("torchrun", "--nproc-per-node", "2", "-m", "learner"),
        ("deepspeed", "--num_accelerators", "2", "--module", "learner"),
    ],
)
async def test_other_launchers_start_the_same_with_the_same_flags(
    launcher: tuple[str, ...], stage: Stage, demo_model: str
):
    assert (COMMANDS / launcher[0]).exists()
    _, *flags = a_run(demo_model, steps=3, ranks=1)
    learner = await stage.start(*launcher, *flags)
    server = await stage.start(*await learner.join_command())
    for command in (learner, server):
        assert await command.exit_code() == 0, repr(command)
    assert stage.steps() == [1, 2, 3]
    assert await stage.has_no()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--sequence-parallel", "--tensor-parallel"])
async def test_ranks_that_compute_together_train_publish_and_export(flag: str, stage: Stage, demo_model: str):
    learner = await stage.start(*a_run(demo_model, steps=3), "--zero-stage", "2", flag, "2", "--canary-every", "1")
    server = await stage.start(*await learner.join_command())
    for command in (learner, server):
        assert await command.exit_code() == 0, repr(command)
    assert stage.steps() == [1, 2, 3]
    exported = next(stage.path.rglob("huggingface/*/model.safetensors"))
    assert load_file(exported).keys() == load_file(Path(demo_model) / "model.safetensors").keys()
    assert await stage.has_no()


async def test_a_mistake_ends_all_ranks_in_one_sentence_and_starts_none_anew(stage: Stage):
    told = await stage.fails(*a_run("nowhere/nothing", steps=3))
    assert "cannot load the model nowhere/nothing" in told
    assert "anew" not in told
    assert await stage.has_no()
