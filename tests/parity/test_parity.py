"""With --max-staleness 0 the whole pipeline is the plain synchronous trainer of tests/oracles/synchronous.py.

Both begin with the same model and go on from their own weights for STEPS steps; the plain trainer is told nothing but
the prompts and which token was chosen each time. Compared at every step, each to 1e-5: the log-probability of every
token when it was sampled (vLLM against transformers' generate), every reward (from the text, in the environment's
worker process against called here), the loss and the norm of the gradient (relative), and every parameter after the
step (DeepSpeed ZeRO 1 against torch). Advantages are in the loss.
"""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.events import read_events
from common.trajectory import Group
from learner.demo.model import build_demo_model
from learner.demo.task import reward
from learner.refused_batches import read_refused_batch
from tests.oracles.synchronous import Sample, Step, SynchronousTrainer
from tests.system.processes import a_stage

STEPS = 6
TOLERANCE = 1e-5
LEARNING_RATE, BETAS, MAX_GRAD_NORM = 5e-5, (0.9, 0.95), 1.0
EPSILON = 1e-6  # Adam's usual 1e-8 makes updates of a tenth of a learning rate out of the rounding of tiny gradients
FLAGS = (
    "--max-staleness", "0", "--total-steps", str(STEPS), "--groups-per-step", "4", "--group-size", "8",
    "--max-new-tokens", "8", "--learning-rate", str(LEARNING_RATE), "--adam-epsilon", str(EPSILON), "--run-dir", "run",
    "--no-tensorboard",
)  # fmt: skip


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A run of everything real: (the model it began with, its directory)."""
    directory = tmp_path_factory.mktemp("parity")
    model = directory / "model"
    build_demo_model(model)
    asyncio.run(run_pipeline(directory, model))
    return str(model), directory


async def run_pipeline(directory: Path, model: Path) -> None:
    async with a_stage(directory) as stage:
        program = ("python", "-m", "tests.parity.recording_learner", "record")
        learner = await stage.start(*program, "--model", str(model), *FLAGS)
        server = await stage.start(*await learner.join_command())
        for command in (learner, server):
            assert await command.exit_code(timeout_s=200) == 0, repr(command)


def steps_of(directory: Path) -> list[dict[str, Any]]:
    events = read_events([directory / "run/events-learner-1.jsonl"])
    return [event for event in events if event["kind"] == "step"]


def samples_of(group: Group) -> list[Sample]:
    samples = []
    for trajectory in group.trajectories:
        first = int(trajectory.loss_mask.argmax())
        assert trajectory.loss_mask[first:].all()
        ids = trajectory.token_ids.tolist()
        samples.append(Sample(prompt_ids=ids[:first], token_ids=ids[first:]))
    return samples


def reward_of(prompt: str, completion: str) -> float:
    return reward(prompt, completion, {"answer": prompt.removesuffix("=")})


def assert_same_sampling(step: Step, groups: Sequence[Group]) -> None:
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    assert step.rewards == pytest.approx([trajectory.reward for trajectory in trajectories], abs=TOLERANCE)
    for expected, trajectory in zip(step.logprobs, trajectories, strict=True):
        sampled = trajectory.behavior_logprobs[trajectory.loss_mask].tolist()
        assert sampled == pytest.approx(expected, abs=TOLERANCE)


def assert_same_update(step: Step, event: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    assert event["loss"] == pytest.approx(step.loss, abs=TOLERANCE)
    assert event["grad_norm"] == pytest.approx(step.grad_norm, rel=TOLERANCE)
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, step.weights[name], rtol=0.0, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_pipeline_at_staleness_0_is_the_plain_synchronous_trainer_step_for_step(recorded):
    model, directory = recorded
    trainer = SynchronousTrainer(
        model, learning_rate=LEARNING_RATE, betas=BETAS, epsilon=EPSILON, max_grad_norm=MAX_GRAD_NORM
    )
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    events = steps_of(directory)
    moved = 0.0
    for version in range(STEPS):
        groups = read_refused_batch(directory / f"record/step-{version:06d}.ccbatch").groups
        step = trainer.step([samples_of(group) for group in groups], reward_of)
        weights = load_file(directory / f"record/weights-{version + 1:06d}.safetensors")
        assert_same_sampling(step, groups)
        assert_same_update(step, events[version], weights)
        moved = max(float((weights[name] - start[name]).abs().max()) for name in weights)
        apart = max(float((weights[name] - step.weights[name]).abs().max()) for name in weights)
        sys.stdout.write(f"step {version}: parameters moved by up to {moved:.1e} and are {apart:.1e} apart\n")
    assert moved > 20 * TOLERANCE  # so that the tolerance tells one update from another
