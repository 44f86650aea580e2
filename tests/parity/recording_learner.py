"""The learner command, unchanged, with a record of what it took in and what came of it.

python -m tests.parity.recording_learner DIRECTORY LEARNER_FLAGS...: in DIRECTORY, every batch as the coordinator handed
it out, and the policy's parameters after every step.
"""

import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from learner.__main__ import main
from learner.coordinator.client import CoordinatorClient
from learner.ppo_engine import PpoEngine
from learner.refused_batches import RefusedBatch, RefusedBatches
from learner.training import StepResult, TrainBatch


def record(directory: Path) -> None:
    take_batch, step = CoordinatorClient.take_batch, PpoEngine.step
    directory.mkdir(parents=True)

    async def recorded_batch(self: CoordinatorClient, version: int) -> Any:
        groups = await take_batch(self, version)
        RefusedBatches(directory).write(RefusedBatch(version=version, reason="recorded", metrics={}, groups=groups))
        return groups

    def recorded_step(self: PpoEngine, batch: TrainBatch) -> StepResult:
        result = step(self, batch)
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in self.snapshot_tensors()}
        save_file(tensors, directory / f"weights-{self.version:06d}.safetensors")
        return result

    CoordinatorClient.take_batch = recorded_batch  # type: ignore[method-assign]
    PpoEngine.step = recorded_step  # type: ignore[method-assign]


if __name__ == "__main__":
    record(Path(sys.argv[1]))
    main(sys.argv[2:])
