"""Real ranks on this machine, two for most tests, started once, which play one scenario after the other."""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file
from torch import Tensor

from common.lifecycle import UserError
from learner.launch import Place, free_port
from learner.training import BatchLayout, TrainSettings
from tests.ranks.worker import Scenario

ROOT = Path(__file__).parents[2]
ANSWER_S = 90.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    weights: dict[str, Tensor]
    metrics: list[dict[str, float]]
    refusals: list[str | None]
    version: int
    layout: BatchLayout


class Pair:
    def __init__(self, processes: list[subprocess.Popen[str]], directory: Path) -> None:
        self._processes = processes
        self._directory = directory

    def play(self, settings: TrainSettings, *, patience_s: float = ANSWER_S, **fields: Any) -> Outcome:
        """See Scenario; raises UserError when the ranks do.

        Raises AssertionError with what they printed when there is no answer in time.
        """
        path = self._directory / "weights.safetensors"
        line = msgspec.json.encode(Scenario(settings=settings, weights=str(path), **fields)).decode()
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = self._answer(patience_s)
        if "user_error" in answer:
            raise UserError(answer["user_error"])
        return Outcome(
            weights=load_file(path),
            metrics=[result["metrics"] for result in answer["results"]],
            refusals=[result["refusal"] for result in answer["results"]],
            version=answer["version"],
            layout=BatchLayout(**answer["layout"]),
        )

    def _answer(self, patience_s: float) -> dict[str, Any]:
        output = self._processes[0].stdout
        assert output is not None
        ready, _, _ = select.select([output], [], [], patience_s)
        line = output.readline() if ready else ""
        assert line.startswith("{"), f"{line!r}\n{self.log}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._directory.glob("rank-*.log")))


@contextmanager
def a_pair(num_ranks: int = 2) -> Iterator[Pair]:
    """Or more of them."""
    with tempfile.TemporaryDirectory() as name:
        directory, port = Path(name), free_port()
        processes = []
        for rank in range(num_ranks):
            place = Place(rank=rank, num_ranks=num_ranks, local_rank=rank, address="127.0.0.1", port=port)
            with (directory / f"rank-{rank}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "tests.ranks.worker"],
                        cwd=ROOT,
                        env={**os.environ, **place.environment(), "PYTHONPATH": str(ROOT)},
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE if rank == 0 else log,
                        stderr=log,
                        text=True,
                    )
                )
        try:
            yield Pair(processes, directory)
        finally:
            for process in processes:
                process.kill()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        stream.close()
