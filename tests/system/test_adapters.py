"""Adapters through the whole loop: a learner that trains them, vLLM that loads them, killed and resumed on the way."""

import json
import signal

import pytest

from tests.system.processes import LEARNER, Stage
from tests.system.test_two_commands import MISMATCH, assert_transformers_loads, finished

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ("--lora-rank", "4", "--max-staleness", "2", "--learning-rate", "1e-2", "--checkpoint-every-steps", "2")


async def test_adapters_are_trained_published_loaded_and_resumed_and_every_version_is_judged(
    stage: Stage, unused_tcp_port: int
):
    """The learner's own forward, with the adapter of the version that each token names, is the judge of every token."""
    here = ("--listen", f"tcp://127.0.0.1:{unused_tcp_port}")
    learner = await stage.start(*LEARNER, *SETTINGS, *here, "--total-steps", "12")
    server = await stage.start(*await learner.join_command())
    await stage.reaches(learner, 5)
    learner.send_signal(signal.SIGKILL)
    await learner.exit_code()
    learner = await stage.start(*LEARNER, *SETTINGS, *here, "--total-steps", "12")
    await finished(learner, server)

    assert max(stage.steps()) == 12
    assert server.log.count("the base model of the adapters is loaded") == 1  # in both lives of the learner
    updates = stage.events("runs/rollout-server/*.jsonl", "weight_update")
    [base] = stage.events("runs/rollout-server/*.jsonl", "base_model_update")
    assert len(updates) > 4
    assert base["version"] == -1
    judged = stage.events("runs/rollout-server/*.jsonl", "canary")
    assert all(canary["ok"] and canary["distance"] < MISMATCH for canary in judged)
    assert {canary["version"] for canary in judged} >= {update["version"] for update in updates[:-1]}
    for lineage in (1, 2):
        steps = stage.events(f"run/events-learner-{lineage}.jsonl", "step")
        assert max(step["staleness_max"] for step in steps) <= 2
    exported = stage.path / "run/huggingface/step-000012"
    assert_transformers_loads(exported)
    assert json.loads((exported / "adapter/adapter_config.json").read_text())["r"] == 4


async def test_merged_snapshots_need_no_adapters_of_the_engine(stage: Stage):
    learner = await stage.start(*LEARNER, *SETTINGS, "--lora-snapshots", "merged", "--total-steps", "4")
    server = await stage.start(*await learner.join_command())
    await finished(learner, server)
    assert "base model" not in server.log
    assert stage.steps()[-1] == 4
