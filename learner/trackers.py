"""Trackers: where the scalars of each step go beside the event log."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from common.lifecycle import UserError
from learner.config import LearnerConfig
from learner.run_directory import RunDirectory


class Tracker(Protocol):
    def log(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Writes into `directory`; look at it with `tensorboard --logdir`."""

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # imports TensorFlow's protocol buffers: only when used

        self._writer: Any = SummaryWriter(log_dir=str(directory))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """Logs to a Weights & Biases project; a resumed run continues its curve."""

    def __init__(self, project: str, *, run_id: str, directory: Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb-project needs the package wandb: pip install wandb") from error
        self._run: Any = wandb.init(project=project, id=run_id, resume="allow", dir=str(directory), config=dict(config))

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def open_trackers(config: LearnerConfig, run: RunDirectory) -> Iterator[Sequence[Tracker]]:
    """Those that are configured; what they have is written when the block ends."""
    with ExitStack() as stack:
        trackers: list[Tracker] = []
        if config.tensorboard:
            trackers.append(TensorBoardTracker(run.path / "tensorboard"))
        if config.wandb_project is not None:
            trackers.append(
                WandbTracker(config.wandb_project, run_id=run.run_id, directory=run.path, config=asdict(config))
            )
        for tracker in trackers:
            stack.callback(tracker.close)
        yield trackers
