"""A learner and a rollout server, as two commands, until the run is finished."""

import math

import pytest

from common.events import read_events
from tests.system.processes import LEARNER, Command, Stage
from tests.system.rewards import SOUND_REWARD

pytestmark = pytest.mark.timeout(300)

MISMATCH = 1e-4  # of log-probabilities in float32


async def finished(*commands: Command) -> None:
    for command in commands:
        assert await command.exit_code() == 0, repr(command)
        assert "Traceback" not in command.log


async def test_a_learner_alone_prints_the_command_that_joins_it_and_the_two_finish_the_run(stage: Stage):
    learner = await stage.start(*LEARNER, "--total-steps", "6", "--max-staleness", "2")
    words = await learner.join_command()
    server = await stage.start(*words)
    await finished(learner, server)
    assert await stage.has_no()

    assert stage.steps() == [1, 2, 3, 4, 5, 6]
    for step in stage.events("run/events-learner-1.jsonl", "step"):
        assert 0 <= step["staleness_max"] <= 2
        assert max(int(age) for age in step["staleness_histogram"]) == step["staleness_max"]
    events = read_events(stage.path.glob("runs/rollout-server/*.jsonl")) + read_events(stage.path.glob("run/*.jsonl"))
    intervals = {event["kind"] for event in events if "t_end" in event}
    assert intervals >= {"train", "wait_batch", "generate", "weight_update", "publish", "save", "canary"}
    loaded = [event["version"] for event in events if event["kind"] == "weight_update"]
    judged = [event["version"] for event in events if event["kind"] == "canary" and event["ok"]]
    assert judged in (loaded, loaded[:-1])  # the run may end before the last one is
    assert_transformers_loads(stage.path / "run/huggingface/step-000006")


def assert_transformers_loads(directory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("1234=", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]


async def test_a_server_that_was_first_waits_and_at_staleness_0_only_the_policy_being_updated_is_trained(
    stage: Stage, demo_model: str, unused_tcp_port: int
):
    """And a reward function that raises, hangs or says NaN fails its tasks, which never reach the optimizer."""
    address = f"tcp://127.0.0.1:{unused_tcp_port}"
    server = await stage.start("rollout-server", "--learner", address, "--environment-timeout-s", "0.5")
    await server.says("waiting for the learner at .*is it running")
    task = ("--environment", "python:tests.system.rewards:faulty", "--max-attempts", "2")
    data = ("--data", "python:tests.system.rewards:prompts_with_faults", "--model", demo_model, "--no-tensorboard")
    strict = ("--listen", address, "--total-steps", "8", "--max-staleness", "0", "--learning-rate", "1e-3")
    learner = await stage.start(*LEARNER, *strict, *task, *data)
    await finished(learner, server)
    assert await stage.has_no()

    steps = stage.events("run/events-learner-1.jsonl", "step")
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert [list(step["staleness_histogram"]) for step in steps] == [["0"]] * 8
    assert max(step["mismatch_abs"] for step in steps) < MISMATCH  # after each push, by its own forward
    assert all(math.isfinite(step["loss"]) and step["reward"] >= SOUND_REWARD for step in steps)
    for kind, reason in (
        ("environment_error", "LookupError: no answer is known to 0000="),
        ("environment_timeout", "0.5 s"),
        ("bad_reward", "a reward must be finite, got nan"),
    ):
        await server.says(rf"task \d+ failed \({kind}\): .*{reason}")
        await learner.says(rf"failed .*[1-9]\d* {kind}")
